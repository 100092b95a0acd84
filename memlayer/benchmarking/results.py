"""What a benchmark gives: one measurement per backend and size, and what was left out, and why.

BenchmarkResult ─┬─ table: MeasuredTable ── measurements: Measurement ── search: SearchTime
                 └─ skipped
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlayer.benchmarking.machine import Machine
    from memlayer.benchmarking.options import BackendSetup

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SearchTime:
    """Seconds of one search of all lanes.

    Attributes:
        queries: in each lane.
        seconds: median of the rounds.
        low: of the quickest round.
        high: of the slowest round.
    """

    queries: int
    seconds: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One backend at one size.

    Attributes:
        setup: the backend.
        size: vectors in each lane.
        exact: whether the backend promises to miss nothing.
        recall: share of the true best that it found, 0 to 1.
        recall_after_turn: the same after every vector was dropped and added anew.
        add: seconds per vector, of filling it.
        append: seconds per vector, of adding to a full memory that drops as many; the mean over a
            whole turn, so that what an engine tidies up now and then is in it.
        search: by queries, fewest first.
    """

    setup: BackendSetup
    size: int
    exact: bool
    recall: float
    recall_after_turn: float
    add: float
    append: float
    search: tuple[SearchTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        values = {**self.setup.to_dict(), **asdict(self)}
        del values["setup"]
        return {**values, "search": [asdict(item) for item in self.search]}


@dataclass(frozen=True, kw_only=True)
class MeasuredTable:
    """Measurements of one machine, from which a backend can be chosen.

    Attributes:
        machine: where.
        date: when, ISO 8601, UTC.
        vectors: what was stored and asked.
        lanes: that each backend held.
        dim: of the vectors.
        k: vectors that a query found.
        measurements: by size and backend, as measured.
    """

    machine: Machine
    date: str
    vectors: str
    lanes: int
    dim: int
    k: int
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "machine": self.machine.to_dict(),
            "date": self.date,
            "vectors": self.vectors,
            "lanes": self.lanes,
            "dim": self.dim,
            "k": self.k,
            "measurements": [item.to_dict() for item in self.measurements],
        }


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something that was not measured.

    Attributes:
        setup: the backend.
        size: vectors in each lane; None: at no size.
        reason: why, a clause.
    """

    setup: BackendSetup
    size: int | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {**self.setup.to_dict(), "size": self.size, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """All that a benchmark measured.

    Attributes:
        table: the measurements.
        skipped: what was to be measured and was not.
        settings: what was asked for, defaults resolved.
        seconds: wall-clock time of all of it.
        interrupted: whether it was broken off; `skipped` lists the rest then.
    """

    table: MeasuredTable
    skipped: tuple[Skipped, ...]
    settings: Mapping[str, Any]
    seconds: float
    interrupted: bool

    def to_dict(self) -> dict[str, Any]:
        """Give the result as JSON types; the table's fields, and beside them the rest."""
        return {
            **self.table.to_dict(),
            "skipped": [item.to_dict() for item in self.skipped],
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "interrupted": self.interrupted,
        }
