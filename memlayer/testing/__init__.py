"""Tests for plug-in authors to run over what they write.

They need pytest and hypothesis: ``pip install "memlayer-lm[testing]"``.

from memlayer.testing import BackendConformance


class TestMine(BackendConformance):
    backend = "mine"

`DecoderConformance` does the same for a family of decoders.
"""

from __future__ import annotations

from memlayer.testing.requirements import require_test_tools

require_test_tools()

import pytest  # noqa: E402

# Before the import: it makes pytest explain a failed assertion of the suite with its values.
pytest.register_assert_rewrite("memlayer.testing.backends", "memlayer.testing.decoders")

from memlayer.testing.backends import BackendConformance  # noqa: E402
from memlayer.testing.decoders import DecoderConformance  # noqa: E402

__all__ = ["BackendConformance", "DecoderConformance"]
