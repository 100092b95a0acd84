"""Measure the installed retrieval backends on this machine.

    options.py   what to measure
    vectors.py   keys and queries: of a model, or drawn to be like them
    timing.py    several sides timed in turn
    recall.py    what a search found of the true best
    subject.py   one backend being measured
    run.py       all of it together, within a budget of time
    results.py   what comes out
    machine.py   where it was measured
    table.py     results as a file, which the backend ``auto`` chooses by

Nothing here is imported before it is asked for: importing this package must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlayer.benchmarking.options import BackendSetup, BenchmarkOptions

if TYPE_CHECKING:
    from memlayer.benchmarking.machine import Machine
    from memlayer.benchmarking.results import (
        BenchmarkResult,
        MeasuredTable,
        Measurement,
        SearchTime,
        Skipped,
    )
    from memlayer.benchmarking.run import run_benchmark
    from memlayer.benchmarking.table import read_table, save_table, table_path
    from memlayer.benchmarking.timing import interleave
    from memlayer.benchmarking.vectors import Pairs, read_pairs, synthetic_pairs

__all__ = [
    "BackendSetup",
    "BenchmarkOptions",
    "BenchmarkResult",
    "Machine",
    "MeasuredTable",
    "Measurement",
    "Pairs",
    "SearchTime",
    "Skipped",
    "interleave",
    "read_pairs",
    "read_table",
    "run_benchmark",
    "save_table",
    "synthetic_pairs",
    "table_path",
]

_HOMES = {
    "BenchmarkResult": "results",
    "Machine": "machine",
    "MeasuredTable": "results",
    "Measurement": "results",
    "Pairs": "vectors",
    "SearchTime": "results",
    "Skipped": "results",
    "interleave": "timing",
    "read_pairs": "vectors",
    "read_table": "table",
    "run_benchmark": "run",
    "save_table": "table",
    "synthetic_pairs": "vectors",
    "table_path": "table",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
