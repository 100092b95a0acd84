"""Measure backends, from the smallest size on, until the time is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from memlayer.benchmarking.machine import Machine
from memlayer.benchmarking.options import BackendSetup, BenchmarkOptions
from memlayer.benchmarking.results import (
    BenchmarkResult,
    MeasuredTable,
    Measurement,
    SearchTime,
    Skipped,
)
from memlayer.benchmarking.subject import Subject, Task, TooSlowError
from memlayer.benchmarking.timing import Timing, interleave
from memlayer.benchmarking.vectors import Pairs, read_pairs, synthetic_pairs
from memlayer.devices import choose_device
from memlayer.errors import ConfigError, MemlayerError
from memlayer.plugins import default_plugins

if TYPE_CHECKING:
    from memlayer.plugins import Plugins
    from memlayer.registry import Registry

Progress = Callable[[int, int, str | None], None]

LEAST_QUERIES = 1_024
"""Queries per lane that are drawn at least: a search asks others each time it is timed."""


@torch.no_grad()
def run_benchmark(
    options: BenchmarkOptions | None = None,
    *,
    plugins: Plugins | None = None,
    progress: Progress | None = None,
) -> BenchmarkResult:
    """Measure building, appending, searching and recall of backends on this machine.

    At each size all backends are filled first, and then timed in turn. So memory must hold that
    many copies of the vectors, or twice that with engines that keep their own. An interrupt
    (Ctrl-C) ends it; what is there until then is given, and the rest listed as skipped.

    Args:
        options: what to measure; None: the defaults.
        plugins: where backends are looked up; None: the installed ones.
        progress: called before each step with how much is done, of how much, and what is next.

    Raises:
        UnknownNameError: if no plug-in has a backend of that name.
        ConfigError: if a setting does not fit the vectors or the device.
        DataError: if the file of pairs cannot be used.
    """
    options = BenchmarkOptions() if options is None else options
    registry = (default_plugins() if plugins is None else plugins).backends
    return _Run(options, registry, progress).result()


class _Run:
    """One benchmark."""

    def __init__(
        self, options: BenchmarkOptions, registry: Registry, progress: Progress | None
    ) -> None:
        self._began = time.perf_counter()
        self._options = options
        self._registry = registry
        self._progress = progress
        self._device = torch.device(choose_device(options.device))
        self._skipped: list[Skipped] = []
        self._measured: list[Measurement] = []
        # What a backend took at the last size that it was measured at.
        self._spent: dict[str, tuple[int, float]] = {}
        self._done = 0
        self._setups = self._find_setups()
        self._pairs = self._find_pairs()

    def result(self) -> BenchmarkResult:
        """Measure, and give all that was measured."""
        interrupted = False
        left = list(self._options.sizes)
        try:
            while left:
                self._measure_size(left[0])
                del left[0]
        except KeyboardInterrupt:
            interrupted = True
            told = {(str(item.setup), item.size) for item in self._measured}
            told |= {(str(item.setup), item.size) for item in self._skipped if item.size}
            for size in left:
                rest = [setup for setup in self._setups if (str(setup), size) not in told]
                self._skip(rest, size, "interrupted")
        modules = {
            name for setup in self._setups for name in self._registry.entry(setup.name).requires
        }
        table = MeasuredTable(
            machine=Machine.here(self._device, modules),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            vectors=self._pairs.source,
            lanes=self._pairs.keys.shape[0],
            dim=self._pairs.keys.shape[2],
            k=self._options.k,
            measurements=tuple(self._measured),
        )
        return BenchmarkResult(
            table=table,
            skipped=tuple(self._skipped),
            settings=self._settings(),
            seconds=time.perf_counter() - self._began,
            interrupted=interrupted,
        )

    def _find_setups(self) -> list[BackendSetup]:
        wanted = list(self._options.backends)
        names = [setup.name for setup in wanted] or self._registry.names()
        reasons = {name: self._registry.unavailable_reason(name) for name in set(names)}
        if not wanted:
            for name in names:
                kind: Any = None if reasons[name] else self._registry.get(name)
                sets: tuple[dict[str, Any], ...] = getattr(kind, "worth_measuring", ({},))
                wanted += [BackendSetup(name=name, options=some) for some in sets]
        setups = []
        for setup in {str(some): some for some in wanted}.values():
            reason = reasons[setup.name]
            if reason is None:
                setups.append(setup)
            else:
                self._skip([setup], None, reason)
        return setups

    def _find_pairs(self) -> Pairs:
        options = self._options
        if options.pairs is not None:
            lanes = None if options.heads is None else options.rows * options.heads
            pairs = read_pairs(options.pairs, sizes=options.sizes, lanes=lanes)
            self._check_pairs(pairs)
            return pairs
        return synthetic_pairs(
            lanes=options.rows * (options.heads or 4),
            keys=options.sizes[-1],
            queries=max(LEAST_QUERIES, options.queries[-1]),
            dim=options.head_dim or 64,
            seed=options.seed,
        )

    def _check_pairs(self, pairs: Pairs) -> None:
        options = self._options
        dim = pairs.keys.shape[2]
        if options.head_dim not in (None, dim):
            raise ConfigError(
                f"head_dim must be that of {options.pairs}, {dim}, got {options.head_dim}"
            )
        if options.queries[-1] > pairs.queries.shape[1]:
            raise ConfigError(
                f"queries must be at most those of {options.pairs}, {pairs.queries.shape[1]} a "
                f"lane, got {options.queries[-1]}"
            )

    def _measure_size(self, size: int) -> None:
        if size > self._pairs.held:
            reason = f"the file has only {self._pairs.held:,} vectors a lane"
            self._skip(self._setups, size, reason)
            self._done += size * len(self._setups)
            return
        task = Task.of(self._pairs, size, self._options.k, self._device)
        spent = dict.fromkeys(map(str, self._setups), 0.0)
        promised = 0.0
        subjects, recalls = [], []
        for setup in self._setups:
            self._tell(setup, size)
            self._done += size
            expected = self._expected(setup, size)
            left = self._left() - promised
            if expected > left:
                self._skip([setup], size, _too_long(expected, left))
                continue
            began = time.perf_counter()
            try:
                subject = Subject(setup, self._registry.get(setup.name), task, seconds=self._left())
                recalls.append(subject.recall())
                subjects.append(subject)
            except TooSlowError as error:
                self._skip([setup], size, _too_long(error.seconds, left))
            except MemlayerError as error:
                self._skip([setup], size, str(error))
            except Exception as error:  # a plug-in's code, or no memory left: the others go on
                self._skip([setup], size, f"it failed: {type(error).__name__}: {error}")
            spent[str(setup)] = time.perf_counter() - began
            promised += max(0.0, expected - spent[str(setup)])
        self._time(subjects, recalls, size, spent)

    def _time(
        self, subjects: list[Subject], recalls: list[float], size: int, spent: dict[str, float]
    ) -> None:
        searches: list[list[SearchTime]] = [[] for _ in subjects]
        for queries in self._options.queries:
            sides = [subject.search(queries) for subject in subjects]
            seconds = interleave(sides, rounds=self._options.rounds, device=self._device)
            for subject, kept, rounds in zip(subjects, searches, seconds, strict=True):
                timing = Timing.of(rounds)
                kept.append(
                    SearchTime(
                        queries=queries, seconds=timing.median, low=timing.low, high=timing.high
                    )
                )
                # One call more that does not count, and quick ones take several.
                spent[str(subject.setup)] += sum(rounds) + timing.median
        for subject, recall, search in zip(subjects, recalls, searches, strict=True):
            began = time.perf_counter()
            append = subject.turn()
            again = subject.recall()
            spent[str(subject.setup)] += time.perf_counter() - began
            self._spent[str(subject.setup)] = (size, spent[str(subject.setup)])
            self._measured.append(
                Measurement(
                    setup=subject.setup,
                    size=size,
                    exact=subject.backend.exact,
                    recall=recall,
                    recall_after_turn=again,
                    add=subject.add,
                    append=append,
                    search=tuple(search),
                )
            )

    def _expected(self, setup: BackendSetup, size: int) -> float:
        last, seconds = self._spent.get(str(setup), (size, 0.0))
        return seconds * size / last

    def _left(self) -> float:
        return max(0.0, self._options.budget - (time.perf_counter() - self._began))

    def _skip(self, setups: list[BackendSetup], size: int | None, reason: str) -> None:
        self._skipped += [Skipped(setup=setup, size=size, reason=reason) for setup in setups]

    def _tell(self, setup: BackendSetup, size: int) -> None:
        if self._progress is not None:
            total = sum(self._options.sizes) * len(self._setups)
            self._progress(self._done, total, f"{setup}, {size:,} vectors a lane")

    def _settings(self) -> dict[str, Any]:
        options = self._options
        return {
            **asdict(options),
            "backends": [str(setup) for setup in self._setups],
            "tokens": list(options.tokens),
            "queries": list(options.queries),
            "heads": self._pairs.keys.shape[0] // options.rows,
            "head_dim": self._pairs.keys.shape[2],
            "pairs": None if options.pairs is None else options.pairs.name,
            "device": str(self._device),
        }


def _too_long(seconds: float, left: float) -> str:
    return f"it would take about {seconds:.0f} s, of {left:.0f} s left; a larger budget has room"
