"""Approximate search with hnswlib: one navigable graph per lane, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from memlayer_backends._checks import check_whole_number, select_lanes
from memlayer_backends.buffered import BufferedBackend

EXACT_SCORES = 2**22
"""Scores held at a time by a search without a graph."""


@dataclass(frozen=True, kw_only=True)
class HnswlibOptions:
    """Options of the ``hnswlib`` backend."""

    m: int = 16
    """Links per vector; more find more, and cost memory and time."""

    ef_construction: int = 200
    """Candidates looked at when a vector is added."""

    ef_search: int = 128
    """Candidates looked at by a search, at least ``k`` in any case."""

    exact_below: int = 512
    """Vectors in a lane from which on it has a graph. A smaller lane is searched exactly."""

    def __post_init__(self) -> None:
        for item in fields(self):
            minimum = 2 if item.name == "m" else 1
            check_whole_number(item.name, getattr(self, item.name), minimum=minimum)


class HnswlibBackend(BufferedBackend):
    """Approximate inner-product search with hnswlib on the CPU, wherever the queries come from.

    Vectors are held twice, in the graphs and beside them: small lanes are searched exactly, graphs
    are built again when more than half of what they hold was removed, and nothing but vectors is
    saved. After `load` the graphs are new ones, so that results may differ within their recall.

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
        self._graphs: list[_Graph | None] = [None] * lanes

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say what is missing and how to install it, or give None."""
        if find_spec("hnswlib") is None:
            return (
                'hnswlib is not installed: pip install "memlayer-lm[hnswlib]" (it compiles; '
                "without a C++ compiler, the wheel of chroma-hnswlib has the same import name)"
            )
        return None

    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        """Append vectors, as the contract says."""
        super().add(keys, lanes)
        self._update_graphs(lanes)

    def remove_oldest(self, n: int, lanes: Sequence[int] | None = None) -> None:
        """Drop the oldest vectors, as the contract says."""
        super().remove_oldest(n, lanes)
        self._update_graphs(lanes)

    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, as the contract says."""
        super().clear(lanes)
        for lane in select_lanes(lanes, self.lanes).tolist():
            self._graphs[lane] = None

    def rebuild(self) -> None:
        """Build all graphs anew."""
        self._graphs = [None] * self.lanes
        self._update_graphs(None)

    def _update_graphs(self, lanes: Sequence[int] | None) -> None:
        for lane in select_lanes(lanes, self.lanes).tolist():
            self._graphs[lane] = self._up_to_date(lane)

    def _up_to_date(self, lane: int) -> _Graph | None:
        graph = self._graphs[lane]
        count = int(self.buffer.counts[lane])
        first_id = int(self.buffer.first_ids[lane])
        # Half the threshold on the way down, or a full lane near it would build at every write.
        if count < (self.options.exact_below // 2 if graph else self.options.exact_below):
            return None
        if graph is not None:
            graph.remove_before(first_id)
            if graph.removed <= count:
                graph.add(self.buffer.newest(lane, first_id + count - graph.next_id))
                return graph
        graph = _Graph(self.dim, first_id, self.options)
        graph.add(self.buffer.newest(lane, count))
        return graph

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search each lane in its graph, or exactly where it has none."""
        shape = (self.lanes, queries.shape[1], k)
        scores = queries.new_full(shape, -torch.inf)
        ids = torch.full(shape, -1)
        for lane, graph in enumerate(self._graphs):
            found = min(k, int(self.buffer.counts[lane]))
            if not found:
                continue
            result = graph.search(queries[lane], found) if graph else None
            best, which = result or self._search_exactly(lane, queries[lane], found)
            scores[lane, :, :found] = best
            ids[lane, :, :found] = which
        return scores, ids

    def _search_exactly(self, lane: int, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        keys = self.buffer.live(torch.tensor([lane]))
        block = max(1, EXACT_SCORES // len(keys))
        best = [(some @ keys.T).topk(k) for some in torch.split(queries, block)]
        positions = torch.cat([item.indices for item in best])
        return torch.cat([item.values for item in best]), positions + self.buffer.first_ids[lane]


class _Graph:
    """One lane's graph, its labels being ids.

    Attributes:
        next_id: the label that the next vector gets.
        removed: vectors in the graph that are marked as deleted.
    """

    def __init__(self, dim: int, first_id: int, options: HnswlibOptions) -> None:
        import hnswlib

        self.next_id = first_id
        self.removed = 0
        self._first_id = first_id
        self._ef_search = options.ef_search
        self._capacity = options.exact_below
        self._index = hnswlib.Index(space="ip", dim=dim)
        self._index.init_index(
            max_elements=self._capacity,
            M=options.m,
            ef_construction=options.ef_construction,
            random_seed=0,
        )

    def add(self, keys: Tensor) -> None:
        n = len(keys)
        held = self._index.get_current_count() + n
        if held > self._capacity:
            self._capacity = max(held, 2 * self._capacity)
            self._index.resize_index(self._capacity)
        if n:
            labels = torch.arange(self.next_id, self.next_id + n)
            # One thread: the order of insertion shapes the graph, and is to be the same each time.
            self._index.add_items(keys.numpy(), labels.numpy(), num_threads=1)
            self.next_id += n

    def remove_before(self, first_id: int) -> None:
        for label in range(self._first_id, min(first_id, self.next_id)):
            self._index.mark_deleted(label)
        self.removed += max(0, first_id - self._first_id)
        self._first_id = max(first_id, self._first_id)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Give scores and ids ``(q, k)``, or None where the graph does not reach ``k`` vectors."""
        self._index.set_ef(max(self._ef_search, k))
        try:
            labels, distances = self._index.knn_query(
                queries.numpy(), k, num_threads=torch.get_num_threads()
            )
        except RuntimeError as error:
            # What hnswlib says when a query met fewer than k vectors that are not deleted.
            if "contiguous 2D array" not in str(error):
                raise
            return None
        return 1.0 - torch.from_numpy(distances), torch.from_numpy(labels.astype("int64"))
