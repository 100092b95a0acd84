"""Progress on standard error, where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


def loading(what: str = "loading the model") -> AbstractContextManager[object]:
    """Show that something is loading while the block runs."""
    from rich.console import Console

    # On a console that is no terminal, a status shows nothing.
    return Console(stderr=True).status(what)


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while the block runs.

    Args:
        doing: what is being done, once the first step is.

    Yields:
        A function to call with what is done and what there is in all.
    """
    from rich.console import Console
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
        yield lambda done, total: bar.update(task, description=doing, completed=done, total=total)
