"""The training log: one JSON object a line, appended while training runs.

``{"kind": "step", "step": 12, ...}`` for every optimiser step and
``{"kind": "evaluation", "step": 50, ...}`` for every evaluation. docs/training.md lists the keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from memlayer.errors import CheckpointError
from memlayer.files import write_atomically

LOG_NAME = "log.jsonl"


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Read all entries of a training log, oldest first.

    A last line that a kill cut off is left out.

    Args:
        path: the file, or the directory of a training run.

    Raises:
        CheckpointError: if another line is not a JSON object.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LOG_NAME
    lines = path.read_bytes().split(b"\n")
    entries = []
    # The part after the last newline is empty, or a line that was never finished.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise CheckpointError(
                f"{path} line {number} must be a JSON object, got {line[:40]!r}; "
                f"restore the file from a copy, or train into another directory"
            )
        entries.append(entry)
    return entries


class TrainingLog:
    """Appends entries to a log, each as one whole line that is in the file at once.

    Args:
        path: the file. It is created where absent.
        last_step: entries of later steps are dropped: a run that resumes at this step will
            write them again.
        write: False: entries are only kept, as in the processes of a run that are not the main one.
        tell: is given each new entry, too.
    """

    def __init__(
        self,
        path: Path,
        *,
        last_step: int,
        write: bool = True,
        tell: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.path = path
        self._tell = tell
        found = read_log(path) if path.exists() else []
        self.entries = [entry for entry in found if entry["step"] <= last_step]
        self._file: IO[str] | None = None
        if write:
            text = "".join(_line(entry) for entry in self.entries)
            write_atomically(path, text.encode())
            self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry."""
        self.entries.append(entry)
        if self._file is not None:
            self._file.write(_line(entry))
            self._file.flush()
        self._tell(entry)

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """Give the evaluation after one step, or None if there is none yet."""
        found = (
            entry
            for entry in reversed(self.entries)
            if entry["kind"] == "evaluation" and entry["step"] == step
        )
        return next(found, None)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _line(entry: dict[str, Any]) -> str:
    # NaN is not JSON, and a run whose loss is NaN stops before it is logged.
    return json.dumps(entry, allow_nan=False) + "\n"
