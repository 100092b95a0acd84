"""Where files lie that can be made again: the user's cache folder."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_SECONDS = 3600
"""After so long without a change an unfinished folder is taken for one of a killed process."""


def user_cache() -> Path:
    """Give memlayer's folder in the user's cache: ``$XDG_CACHE_HOME/memlayer``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "memlayer"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that is there as a whole or not at all, whenever the process is killed.

    If another process fills it meanwhile, that one stays.

    Args:
        folder: is not there yet; its parents are made if need be.

    Yields:
        A new folder to write into, in the same parent.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for partial in folder.parent.glob("partial-*"):
        if time.time() - _last_change(partial) > STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)
    partial = folder.parent / f"partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _last_change(folder: Path) -> float:
    changes = []
    for path in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):  # another process removes it, too
            changes.append(path.stat().st_mtime)
    return max(changes, default=0.0)
