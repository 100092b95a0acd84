"""Where files lie that can be made again: the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Give memlayer's folder in the user's cache: ``$XDG_CACHE_HOME/memlayer``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "memlayer"
