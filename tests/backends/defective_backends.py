"""Backends that are wrong in one way each, and the conformance suite over every one of them.

`test_suite_catches_defects.py` runs this file in a process of its own, as a plug-in author would,
and looks which tests fail. It is no test file: all of it but `TestSound` has to fail.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from memlayer import RetrievalBackend, SearchResult
from memlayer.testing import BackendConformance
from memlayer_backends.buffered import BufferedBackend


class Sound(BufferedBackend):
    """Right in all ways: one exact search after the other."""

    name = "sound"

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = torch.full((*queries.shape[:2], k), -torch.inf)
        ids = torch.full(scores.shape, -1)
        for lane in range(self.lanes):
            products = self.queries_of(queries, lane) @ self.keys_of(lane).T
            best, positions = self.best_of(products, min(k, products.shape[1]))
            scores[lane, :, : best.shape[1]] = best
            ids[lane, :, : best.shape[1]] = positions + self.buffer.first_ids[lane]
        return scores, ids

    def queries_of(self, queries: Tensor, lane: int) -> Tensor:
        return queries[lane]

    def keys_of(self, lane: int) -> Tensor:
        return self.buffer.live(torch.tensor([lane]))

    def best_of(self, products: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = products.topk(k)
        return best.values, best.indices


class OneOffAfterEviction(Sound):
    def search(self, queries: Tensor, k: int) -> SearchResult:
        result = super().search(queries, k)
        evicted = (self.buffer.first_ids > 0)[:, None, None] & (result.ids >= 0)
        return SearchResult(scores=result.scores, ids=result.ids + evicted.long())


class SwappedLanes(Sound):
    def search(self, queries: Tensor, k: int) -> SearchResult:
        result = super().search(queries.flip(0), k)
        return SearchResult(scores=result.scores.flip(0), ids=result.ids.flip(0))


class AddsInTheOrderOfLanes(Sound):
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        super().add(keys, lanes if lanes is None else sorted(lanes))


class MinusOneAsAnIndex(Sound):
    """Scores what was found once more, and what was not found as if it were the newest vector."""

    def search(self, queries: Tensor, k: int) -> SearchResult:
        result = super().search(queries, k)
        scores = result.scores.clone()
        for lane in range(self.lanes):
            keys = self.keys_of(lane)
            if len(keys):
                positions = result.ids[lane] - self.buffer.first_ids[lane]
                positions[result.ids[lane] < 0] = -1
                scores[lane] = (queries[lane, :, None].float() * keys[positions]).sum(-1)
        return SearchResult(scores=scores, ids=result.ids)


class StaleIdsAfterLoad(Sound):
    def load(self, directory: Path) -> None:
        super().load(directory)
        self.buffer.first_ids.zero_()


class ForgetsALaneWhenClearing(Sound):
    def clear(self, lanes: Sequence[int] | None = None) -> None:
        super().clear(list(range(self.lanes) if lanes is None else lanes)[1:])


class KeepsCountingAfterClear(Sound):
    def clear(self, lanes: Sequence[int] | None = None) -> None:
        first_ids, counts = self.buffer.first_ids.clone(), self.buffer.counts.clone()
        super().clear(lanes)
        self.buffer.first_ids += (first_ids + counts) * (counts > self.buffer.counts)


class StartsAgainWhenEmptied(Sound):
    def remove_oldest(self, n: int, lanes: Sequence[int] | None = None) -> None:
        super().remove_oldest(n, lanes)
        self.buffer.first_ids[self.buffer.counts == 0] = 0


class WrongAfterTheRingWraps(Sound):
    """Looks at the first of the two pieces that a ring's vectors lie in."""

    def keys_of(self, lane: int) -> Tensor:
        pieces = self.buffer.pieces(lane)
        start, stop = pieces[0] if pieces else (0, 0)
        return self.buffer.keys[lane, start:stop]


class MissesTheNewestVector(Sound):
    def keys_of(self, lane: int) -> Tensor:
        return super().keys_of(lane)[:-1]


class UnsortedResults(Sound):
    def best_of(self, products: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, positions = super().best_of(products, k)
        return scores.flip(-1), positions.flip(-1)


class LessThanK(Sound):
    def best_of(self, products: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, positions = super().best_of(products, k)
        return scores[:, :9], positions[:, :9]


class EqualScoresHideBetterOnes(Sound):
    """Takes the oldest vectors that score at least as much as the last one there is room for."""

    def best_of(self, products: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not k:
            return super().best_of(products, k)
        kth = products.topk(k).values[:, -1:]
        enough = (products >= kth).int()
        positions = torch.sort(enough, dim=-1, descending=True, stable=True).indices[:, :k]
        scores, order = products.gather(1, positions).sort(-1, descending=True)
        return scores, positions.gather(1, order)


class StoresWhateverComes(Sound):
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        super().add(keys.nan_to_num(), lanes)


class HalfPrecision(Sound):
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        super().add(keys.bfloat16(), lanes)


class KeepsTheCallersTensor(Sound):
    """Adds when it is asked something."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.waiting: list[tuple[Tensor, Sequence[int] | None]] = []

    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        super().add(keys[:, :0], lanes)
        self.waiting.append((keys, lanes))

    def counts(self) -> Tensor:
        while self.waiting:
            super().add(*self.waiting.pop(0))
        return super().counts()

    def search(self, queries: Tensor, k: int) -> SearchResult:
        self.counts()
        return super().search(queries, k)


class OneScratchForAllThreads(Sound):
    """Keeps the queries of the search that is running in the object."""

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.queries = queries
        return super().search_keys(queries, k)

    def queries_of(self, queries: Tensor, lane: int) -> Tensor:
        return self.queries[lane]


class LosesItsContentsToADamagedFile(Sound):
    def load(self, directory: Path) -> None:
        self.clear()
        super().load(directory)


class Suite(BackendConformance):
    __test__ = False
    kind: ClassVar[type[Sound]]
    random_sequences = 4
    shortest_failure = False

    def make_backend(self, lanes: int, dim: int, **options: Any) -> RetrievalBackend:
        return self.kind(lanes=lanes, dim=dim, **options)

    def make_with_defaults(self, lanes: int, dim: int) -> RetrievalBackend:
        return self.make_backend(lanes, dim)


for kind in (Sound, *Sound.__subclasses__()):
    name = f"Test{kind.__name__}"
    globals()[name] = type(name, (Suite,), {"kind": kind, "__test__": True})
