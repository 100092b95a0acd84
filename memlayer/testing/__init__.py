"""Tests for plug-in authors to run over what they write. Needs pytest.

from memlayer.testing import BackendConformance


class TestMine(BackendConformance):
    backend = "mine"
"""

from __future__ import annotations

import pytest

# Before the import: it makes pytest explain a failed assertion of the suite with its values.
pytest.register_assert_rewrite("memlayer.testing.backends")

from memlayer.testing.backends import BackendConformance  # noqa: E402

__all__ = ["BackendConformance"]
