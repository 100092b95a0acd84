"""One writer at a time for a bank's directory; readers need no lock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from memlayer.errors import StorageError

LOCK_NAME = "lock"


@contextmanager
def bank_lock(directory: str | Path) -> Iterator[None]:
    """Be the only writer of a bank's directory inside the block; the directory is made if need be.

    `MemoryBank.save` takes this lock for its own time. A program that loads a bank, adds to it and
    saves it holds it all along, or a second one could save in between. The same thread may take it
    again inside the block. The operating system gives it back when the process ends, however.

    Raises:
        StorageError: if another process (or thread) holds it, or the directory cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory.resolve() / LOCK_NAME
        # One object per path, which counts how often its thread has taken it.
        lock = FileLock(path, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"another process is writing to {directory}{_holder(path)}; wait until it has ended"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise StorageError(f"{directory} cannot be written: {error}") from error
    try:
        # For the message above only; where it cannot be written the lock holds all the same.
        with suppress(OSError):
            path.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        text = path.read_bytes()[:20].decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (pid {text})" if text.isdigit() else ""
