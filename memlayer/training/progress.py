"""Progress on standard error, where that is a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows how far a training run is; silent if not wanted.

    Args:
        steps: all steps of the run.
        done: steps done before.
        show: whether to draw a bar. None: if standard error is a terminal.
    """

    def __init__(self, *, steps: int, done: int, show: bool | None) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (console.is_terminal if show is None else show),
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, note="")
        self._loss = self._memory = ""

    def __enter__(self) -> TrainingProgress:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop drawing; the last state stays on the screen."""
        self._progress.stop()

    def doing(self, what: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=what)

    def stepped(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        self._loss = f"loss {loss:.3f}"
        self._show(completed=step)

    def evaluated(self, memory_on: float, memory_off: float) -> None:
        """Show the last validation perplexities."""
        self._memory = f"perplexity {memory_on:.2f} with memory, {memory_off:.2f} without"
        self._show()

    def _show(self, completed: int | None = None) -> None:
        note = "  ".join(part for part in (self._loss, self._memory) if part)
        self._progress.update(self._task, completed=completed, note=note)


class TokenizingProgress:
    """Counts the documents that are tokenized; silent if not wanted, and gone afterwards.

    Args:
        show: as for `TrainingProgress`.
    """

    def __init__(self, *, show: bool | None) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]tokenizing"),
            TextColumn("{task.completed:,.0f} documents"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal if show is None else show),
        )
        self._task = self._progress.add_task("tokenizing", total=None)

    def __enter__(self) -> TokenizingProgress:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._progress.stop()

    def done(self, documents: int) -> None:
        """Show how many documents are done."""
        self._progress.update(self._task, completed=documents)
