"""Progress on standard error, where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


def loading(what: str = "loading the model") -> AbstractContextManager[object]:
    """Show that something is loading while the block runs."""
    from rich.console import Console

    # On a console that is no terminal, a status shows nothing.
    return Console(stderr=True).status(what)


class Step(Protocol):
    """Shows how far a piece of work is."""

    def __call__(self, done: int, total: int, what: str | None = None) -> None:
        """Show that ``done`` of ``total`` are done, of ``what`` if that changes."""


@contextmanager
def progress_bar(doing: str) -> Iterator[Step]:
    """Show a bar while the block runs.

    Args:
        doing: what is being done, once the first step is.

    Yields:
        What to call after each step.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("loading", total=None)

        def step(done: int, total: int, what: str | None = None) -> None:
            description = doing if what is None else f"{doing} {escape(what)}"
            bar.update(task, description=description, completed=done, total=total)

        yield step
