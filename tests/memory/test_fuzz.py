"""Damaged banks and checkpoints; the long run is ``benchmarks/fuzz.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits its own memory")
def test_damaged_files_are_refused_or_load_correctly():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cases", "160", "--seed", "7"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 failures" in done.stdout
    # Some get through, most do not, and both kinds of directories are met.
    for outcome in ("bank, loaded", "bank, refused", "checkpoint, refused"):
        assert int(re.search(rf"(\d+) {outcome}", done.stdout)[1]) > 2, done.stdout
