"""Which backend suits which number of stored vectors, by a table of measurements.

    table ─► at each measured size: the quickest that may be used ─► steps, the first from 0 on

A size stands for what is nearest to it: between two of them the geometric mean divides. From step
to step a backend is kept unless another is at least a tenth quicker.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayer.benchmarking.machine import processor_name
from memlayer.benchmarking.options import BackendSetup
from memlayer.benchmarking.table import read_table, table_path
from memlayer.errors import ConfigError, MemlayerError
from memlayer.plugins import default_plugins
from memlayer_backends.buffered import BufferedBackend

if TYPE_CHECKING:
    import torch

    from memlayer.benchmarking.results import MeasuredTable, Measurement, SearchTime
    from memlayer_backends.auto import AutoOptions

logger = logging.getLogger(__name__)

WORTH_CHANGING = 0.9
"""A backend is changed for one whose cost is at most this part of its own."""

FALLBACK = BackendSetup(name="torch")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A backend, and the sizes that it is for.

    Attributes:
        from_size: vectors in the fullest lane from which on it is used.
        setup: the backend.
        reason: why, a clause.
    """

    from_size: int
    setup: BackendSetup
    reason: str


def make_plan(options: AutoOptions, device: torch.device) -> tuple[Step, ...]:
    """Choose backends for all sizes, or the one for ``expected_size``; the first is from 0 on."""
    table = find_table(device)
    if table is None:
        reason = (
            f"exact, and one product searches all lanes; nothing was measured on {device.type} "
            "('memlayer bench --save' does)"
        )
        return (Step(from_size=0, setup=FALLBACK, reason=reason),)
    steps = _Planner(table, options, device).steps()
    if options.expected_size is not None:
        (*_, last) = (step for step in steps if step.from_size <= options.expected_size)
        reason = f"for an expected_size of {options.expected_size:,}: {last.reason}"
        return (Step(from_size=0, setup=last.setup, reason=reason),)
    changes = [after for before, after in pairwise(steps) if after.setup != before.setup]
    return (steps[0], *changes)


def find_table(device: torch.device) -> MeasuredTable | None:
    """Give the user's table for a device, or else the one that comes with memlayer, or None.

    A table that is damaged, or of another machine, is left aside with a warning.
    """
    own = table_path(device.type)
    if own.exists():
        try:
            table = read_table(own)
            _check_origin(own, table, device)
        except ConfigError as error:
            _warn_once(f"the measured table is left aside: {error}")
        else:
            return table
    shipped = Path(__file__).with_name(f"auto_{device.type}.json")
    return read_table(shipped) if shipped.exists() else None


def _check_origin(path: Path, table: MeasuredTable, device: torch.device) -> None:
    here = (device.type, processor_name(device))
    there = (table.machine.device, table.machine.processor)
    if here != there:
        raise ConfigError(
            f"{path} was measured on {there[1]} ({there[0]}), this is {here[1]} ({here[0]}); "
            "measure again with 'memlayer bench --save'"
        )


class _Planner:
    """Steps from one table."""

    def __init__(self, table: MeasuredTable, options: AutoOptions, device: torch.device) -> None:
        self._table = table
        self._options = options
        self._device = device
        self._problems: dict[str, str | None] = {}

    def steps(self) -> list[Step]:
        """Give one step for each size of the table, of which some have the same backend."""
        sizes = sorted({item.size for item in self._table.measurements})
        bounds = [0] + [math.ceil(math.sqrt(a * b)) for a, b in pairwise(sizes)]
        steps: list[Step] = []
        for bound, size in zip(bounds, sizes, strict=True):
            there = [item for item in self._table.measurements if item.size == size]
            before = steps[-1].setup if steps else None
            if not any(item.setup == before for item in self._table.measurements):
                before = None  # Of a fallback nothing is known.
            steps.append(self._step(bound, there, before))
        return steps

    def _step(self, bound: int, there: list[Measurement], before: BackendSetup | None) -> Step:
        ranked = sorted((item for item in there if self._allowed(item)), key=self._rank)
        usable = [item for item in ranked if self._problem(item) is None]
        kept = next((item for item in usable if item.setup == before), None)
        measured = any(item.setup == before for item in there)
        if before is not None and (not usable or not measured):
            # Too slow to be measured, most likely, but nothing is known to be better.
            reason = f"as for fewer vectors; it was not measured with {there[0].size:,} a lane"
            return Step(from_size=bound, setup=before, reason=reason)
        if not usable:
            reason = "exact, and nothing in the measured table can be used"
            return Step(from_size=bound, setup=FALLBACK, reason=reason)
        best = usable[0]
        if kept is not None and self._cost(best) > WORTH_CHANGING * self._cost(kept):
            best = kept
        return Step(
            from_size=bound, setup=best.setup, reason=self._reason(best, ranked, usable, there)
        )

    def _allowed(self, item: Measurement) -> bool:
        return item.exact or (
            self._options.approximate and _recall(item) >= self._options.minimum_recall
        )

    def _rank(self, item: Measurement) -> tuple[float, str]:
        return self._cost(item), str(item.setup)

    def _cost(self, item: Measurement) -> float:
        """Give seconds of one query in one lane and of the writes that come with it."""
        asked = self._options.queries
        numbers = [asked] if asked else [item.search[0].queries, item.search[-1].queries]
        writes = self._options.writes_per_query * item.append
        costs = [
            max(1e-12, _per_query(item.search, number) / self._table.lanes + writes)
            for number in numbers
        ]
        return math.prod(costs) ** (1 / len(costs))

    def _problem(self, item: Measurement) -> str | None:
        name = str(item.setup)
        if name not in self._problems:
            self._problems[name] = _problem(item, self._device)
        return self._problems[name]

    def _reason(
        self,
        best: Measurement,
        ranked: list[Measurement],
        usable: list[Measurement],
        there: list[Measurement],
    ) -> str:
        found = "exact" if best.exact else f"finds {_recall(best):.3f} of the best"
        text = f"{found}, and takes {self._shown(best)} a query with its writes"
        other = next((item for item in usable if item is not best), None)
        if other is not None:
            text += f" against {self._shown(other)} of {other.setup}"
        text += (
            f", as measured with {best.size:,} vectors a lane on {self._table.machine.processor}"
        )
        parts = [text]
        parts += [
            f"{item.setup} is quicker, but {self._problem(item)}"
            for item in ranked
            if self._problem(item) is not None and self._cost(item) < self._cost(best)
        ]
        low = [item for item in there if not item.exact and not self._allowed(item)]
        if best.exact and self._options.approximate and low:
            most = max(map(_recall, low))
            parts.append(
                f"approximate ones that find {self._options.minimum_recall} were sought, and "
                f"others found {most:.3f}"
            )
        return "; ".join(parts)

    def _shown(self, item: Measurement) -> str:
        return f"{1e6 * self._cost(item):.3g} µs"


def find_kind(setup: BackendSetup) -> type[BufferedBackend]:
    """Give the class of a setup.

    Raises:
        MemlayerError: if there is none, or it cannot hand vectors on.
    """
    kind = default_plugins().backends.get(setup.name)
    if not isinstance(kind, type) or not issubclass(kind, BufferedBackend):
        raise ConfigError(f"backend {setup.name!r} cannot take over vectors; use it by its name")
    return kind


def _problem(item: Measurement, device: torch.device) -> str | None:
    """Say why a measured backend cannot be used here, or give None."""
    registry = default_plugins().backends
    setup = item.setup
    try:
        reason = registry.unavailable_reason(setup.name)
        if reason is not None:
            return reason
        kind = find_kind(setup)
        if kind.keeps_keys_on_cpu and device.type != "cpu":
            return f"it keeps its vectors on the CPU, and these are on {device.type}"
        options: Mapping[str, Any] = setup.options
        made = kind(lanes=1, dim=1, device=device, **options)
    except MemlayerError as error:
        return str(error)
    if item.exact and not made.exact:
        return "it is exact no more"
    return None


def _recall(item: Measurement) -> float:
    return min(item.recall, item.recall_after_turn)


def _per_query(search: tuple[SearchTime, ...], queries: int) -> float:
    """Give seconds per query of all lanes; between measured numbers on a straight log-log line."""
    points = [
        (math.log(item.queries), math.log(max(item.seconds, 1e-12) / item.queries))
        for item in search
    ]
    at = min(max(math.log(queries), points[0][0]), points[-1][0])
    for (left, low), (right, high) in pairwise(points):
        if left <= at <= right:
            return math.exp(low + (high - low) * (at - left) / (right - left))
    return math.exp(points[0][1])


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
