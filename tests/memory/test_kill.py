"""A writer that is killed, again and again; the long run is ``benchmarks/kill.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_whenever_a_writer_is_killed_nothing_acknowledged_is_lost():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "15", "--seed", "3"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    counts = re.search(r"15 kills, (\d+) acknowledged saves of (\d+) tokens, 0 lost", done.stdout)
    # The kills mean something only if saves were on their way.
    assert int(counts[1]) > 5, done.stdout
    assert int(counts[2]) > 100, done.stdout
