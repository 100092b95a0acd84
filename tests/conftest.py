"""Fixtures of every test folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder with reference numbers and data sets, or skip the test where it is absent.

    It is no part of the repository. ``MEMLAYER_SHARED`` names it; otherwise it is expected beside
    the checkout.
    """
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("MEMLAYER_SHARED") or root.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"needs the reference data, and there is no folder {folder}")
    return folder
