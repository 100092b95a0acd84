"""One backend that is being measured at one size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayer.benchmarking.recall import kth_scores, recall
from memlayer.benchmarking.timing import synchronize

if TYPE_CHECKING:
    from memlayer.benchmarking.options import BackendSetup
    from memlayer.benchmarking.vectors import Pairs
    from memlayer.retrieval import RetrievalBackend

PIECE = 256
"""Vectors a lane in one write: a segment of 1,024 tokens in chunks of 4."""

RECALL_QUERIES = 256
"""Queries per lane that recall is measured with, at most."""

EARLY = 1.0
"""Seconds of a build after which its time is foretold."""


class TooSlowError(Exception):
    """A build would take longer than there is time.

    Attributes:
        seconds: that it would take.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"building would take about {seconds:.0f} s")
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every backend is given at one size.

    Attributes:
        keys: ``(lanes, n, dim)``, float32, on the device.
        queries: ``(lanes, q, dim)``, likewise.
        kth: ``(lanes, RECALL_QUERIES or q)``. The score of the k-th best vector, on the CPU.
        k: vectors to find.
    """

    keys: Tensor
    queries: Tensor
    kth: Tensor
    k: int

    @classmethod
    def of(cls, pairs: Pairs, size: int, k: int, device: torch.device) -> Task:
        """Take the first ``size`` keys of each lane, and find the true best."""
        keys = pairs.keys[:, :size].contiguous()
        kth = kth_scores(keys, pairs.queries[:, :RECALL_QUERIES], k)
        return cls(keys=keys.to(device), queries=pairs.queries.to(device), kth=kth, k=k)

    @property
    def device(self) -> torch.device:
        """Where queries come from."""
        return self.keys.device


class Subject:
    """A backend, filled.

    Attributes:
        setup: name and options.
        backend: the object.
        add: seconds per vector, of filling it.

    Args:
        setup: name and options.
        kind: the backend's class.
        task: what to fill it with.
        seconds: that filling it may take.

    Raises:
        TooSlowError: if that takes longer.
    """

    def __init__(self, setup: BackendSetup, kind: Any, task: Task, *, seconds: float) -> None:
        self.setup = setup
        self._task = task
        lanes, size, dim = task.keys.shape
        self.backend: RetrievalBackend = kind(
            lanes=lanes, dim=dim, device=task.device, **setup.options
        )
        began = time.perf_counter()
        for start in range(0, size, PIECE):
            self.backend.add(task.keys[:, start : start + PIECE])
            spent = time.perf_counter() - began
            foretold = spent * size / min(size, start + PIECE)
            if spent > EARLY and foretold > seconds:
                raise TooSlowError(foretold)
        filling = time.perf_counter() - began
        self.add = (filling + self._first_search()) / (lanes * size)

    def recall(self) -> float:
        """Search for the k best and compare them with the true ones."""
        task = self._task
        asked = task.queries[:, : task.kth.shape[1]]
        ids = self.backend.search(asked, task.k).ids.cpu()
        # After turns the ids of the same vectors are larger by as many sizes.
        size = task.keys.shape[1]
        positions = torch.where(ids < 0, -1, ids % size)
        return recall(task.keys.cpu(), asked.cpu(), positions, task.kth)

    def search(self, queries: int) -> Callable[[], object]:
        """Give a search that asks other queries each time, as far as there are others."""
        task = self._task
        parts = [part for part in task.queries.split(queries, dim=1) if part.shape[1] == queries]
        parts = [part.contiguous() for part in parts]
        calls = 0

        def call() -> object:
            nonlocal calls
            calls += 1
            return self.backend.search(parts[calls % len(parts)], task.k)

        return call

    def turn(self) -> float:
        """Drop every vector and add it anew, a piece at a time: seconds per vector."""
        task = self._task
        lanes, size, _ = task.keys.shape
        piece = min(PIECE, max(1, size // 4))
        synchronize(task.device)
        began = time.perf_counter()
        for new in task.keys.split(piece, dim=1):
            self.backend.remove_oldest(new.shape[1])
            self.backend.add(new)
        self._search(self._task.queries[:, :1])
        return (time.perf_counter() - began) / (lanes * size)

    def _first_search(self) -> float:
        """Give the seconds by which the first search takes longer than the second.

        Some engines build only when they are asked; if they are not exact, by what they are asked.
        """
        queries = self._task.queries
        # The later half, so that recall is not measured with what it was built by.
        later = 1 if self.backend.exact else queries.shape[1] // 2
        asked = queries[:, queries.shape[1] - later :].contiguous()
        first, second = self._search(asked), self._search(asked)
        return max(0.0, first - second)

    def _search(self, queries: Tensor) -> float:
        began = time.perf_counter()
        self.backend.search(queries, self._task.k)
        synchronize(self._task.device)
        return time.perf_counter() - began
