"""Approximate search with hnswlib: navigable graphs of each lane, on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from memlayer_backends._checks import select_lanes
from memlayer_backends._graph_lane import GraphLane, HnswlibOptions
from memlayer_backends.buffered import BufferedBackend
from memlayer_backends.key_space import QueryMoments
from memlayer_backends.rescoring import best_of

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

EXACT_SCORES = 2**22
"""Scores held at a time by a search without a graph."""

FEW = 16
"""Queries or insertions in a lane up to which starting threads takes longer than they save."""

LONG_BUILD = 100_000
"""Vectors from which on building graphs in one go is worth a line in the log."""


class HnswlibBackend(BufferedBackend):
    """Approximate inner-product search with hnswlib on the CPU, wherever the queries come from.

    Graphs find candidates; their scores are exact. A graph takes in what was written since when it
    is next searched. Lanes are built and searched in parallel, by as many threads as torch uses,
    which change no result: each lane's graph is made by one thread. Vectors are held beside the
    graphs too, and nothing else is saved. What is found depends, within the recall, on what was
    asked before, and after `load` the graphs are new ones.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: fields of `HnswlibOptions`.
    """

    name = "hnswlib"
    options_type = HnswlibOptions
    keeps_keys_on_cpu = True

    options: HnswlibOptions

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        super().__init__(lanes=lanes, dim=dim, device=device, **options)
        self._graphs = [GraphLane(self.options) for _ in range(lanes)]
        self._moments = QueryMoments(lanes=lanes, dim=dim)
        self._one_at_a_time = Lock()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say what is missing and how to install it, or give None."""
        if find_spec("hnswlib") is None:
            return (
                'hnswlib is not installed: pip install "memlayer-lm[hnswlib]" (it compiles; '
                "without a C++ compiler, the wheel of chroma-hnswlib has the same import name)"
            )
        return None

    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, as the contract says."""
        super().clear(lanes)
        for lane in select_lanes(lanes, self.lanes).tolist():
            self._graphs[lane].clear()

    def rebuild(self) -> None:
        """Forget all graphs; the next search makes new ones."""
        for graph in self._graphs:
            graph.clear()

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search each lane in its graph, which follows first, or exactly where it has none."""
        # Whoever searches may build, and how far hnswlib looks is a setting of the whole graph.
        with self._one_at_a_time:
            ids = self._candidates(queries, k)
        return best_of(self.buffer, queries, ids, k)

    def _candidates(self, queries: Tensor, k: int) -> Tensor:
        self._moments.note(queries)
        self._follow(queries.shape[1])
        ids = torch.full((self.lanes, queries.shape[1], k), -1)
        counts = self.buffer.counts.tolist()
        with_graph = [lane for lane, graph in enumerate(self._graphs) if graph.current is not None]
        # Threads that have no lane of their own share the queries of one.
        inside = max(1, torch.get_num_threads() // max(1, len(with_graph)))

        def search_graph(lane: int) -> Tensor | None:
            found = min(k, counts[lane])
            return self._graphs[lane].search(queries[lane], found, threads=inside)

        threads = _threads_for(queries.shape[1])
        found = _for_each(search_graph, with_graph, threads)
        results = dict(zip(with_graph, found, strict=True))
        for lane, count in enumerate(counts):
            if count:
                n = min(k, count)
                result = results.get(lane)
                if result is None:
                    result = self._search_exactly(lane, queries[lane], n)
                ids[lane, :, :n] = result
        return ids

    def _search_exactly(self, lane: int, queries: Tensor, k: int) -> Tensor:
        keys = self.buffer.live(torch.tensor([lane]))
        block = max(1, EXACT_SCORES // len(keys))
        best = [(some @ keys.T).topk(k).indices for some in torch.split(queries, block)]
        return torch.cat(best) + self.buffer.first_ids[lane]

    def _follow(self, n_queries: int) -> None:
        waiting = sum(
            int(count)
            for count, graph in zip(self.buffer.counts, self._graphs, strict=True)
            if graph.current is None and count >= self.options.exact_below
        )
        if waiting >= LONG_BUILD:
            logger.info("building hnswlib graphs of %d vectors", waiting)

        def follow(lane: int) -> None:
            self._graphs[lane].follow(self.buffer, lane, self._moments, n_queries)

        ends = (self.buffer.first_ids + self.buffer.counts).tolist()
        new = sum(
            end - (graph.current.next_id if graph.current else 0)
            for end, graph in zip(ends, self._graphs, strict=True)
        )
        _for_each(follow, range(self.lanes), _threads_for(n_queries + new // self.lanes))


def _threads_for(per_lane: int) -> int:
    """Give the threads worth starting for so many queries or insertions in each lane."""
    return torch.get_num_threads() if per_lane > FEW else 1


def _for_each(work: Callable[[int], ResultT], lanes: Sequence[int], threads: int) -> list[ResultT]:
    """Give ``work`` of each lane; hnswlib leaves Python's lock alone, so threads do help."""
    threads = min(threads, len(lanes))
    if threads <= 1:
        return [work(lane) for lane in lanes]
    # Made anew each time: threads that are kept would be missing in a forked process.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, lanes))
