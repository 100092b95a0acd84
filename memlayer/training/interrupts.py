"""Ctrl-C as a wish that is granted between two steps, when everything is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """While entered, the first Ctrl-C is only noted; a second one stops at once, as usual.

    Outside the main thread, where Python lets nobody handle signals, Ctrl-C acts as usual.

    Attributes:
        requested: whether there was one.
        forced: whether there was a second one.
    """

    def __init__(self) -> None:
        self.requested = self.forced = False
        self._installed = False
        self._before: signal.Handlers | object | None = None

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one."""
        if self.requested:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        """Note Ctrl-C from here on."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave Ctrl-C as it was found."""
        if self._installed:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.forced = self.requested
        self.requested = True
        if self.forced:
            raise KeyboardInterrupt
