"""One lane's graph, and its successor, which is built a little at a time.

hnswlib cannot take a vector out of a graph: it is marked, and every search goes on wading through
it. So from the first removal on, what is added goes into two graphs:

    ids        0        N        2N       3N
    current    ████████████████           searched; of 2N vectors at most N are marked
    following           ████████████████  holds all that is left when 0 .. N are gone: takes over

In a full ring nothing else is needed: when as many vectors were removed as the lane holds, the
following graph has all the others. Where less is added than removed, the following graph takes in
older vectors as well, no more of them at a time than were removed just now. The same way a lane
that is searched exactly gets its first graph. So ``a`` new vectors mean at most ``2 a`` insertions,
and ``d`` dropped ones at most ``d``; none is much longer in coming than another.

Graphs follow when they are searched, since only then it is known what is asked for: each is made in
a `KeySpace` fitted to the queries so far. One that was made when few were known gets a successor
as well, which takes in as many vectors with each search as there are queries.

The alternative, a row of graphs of which the oldest is dropped whole, inserts each vector once, but
every search visits all of them. A vector is searched past several times as often as one is
added: by each token of each query head, while one vector is that of a whole chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer_backends._checks import check_whole_number
from memlayer_backends.key_space import KeySpace, QueryMoments

if TYPE_CHECKING:
    from memlayer_backends.key_buffer import KeyBuffer

SAMPLE = 4096
"""Vectors that a graph's space is fitted to; 512 of a real model's keys are as good as all."""


@dataclass(frozen=True, kw_only=True)
class HnswlibOptions:
    """Options of the ``hnswlib`` backend."""

    m: int = 16
    """Links per vector; more find more, and cost memory and time."""

    ef_construction: int = 100
    """Candidates looked at when a vector is added."""

    ef_search: int | None = None
    """Candidates looked at by a search, at least ``k`` in any case. None: `default_ef_search`."""

    exact_below: int = 2048
    """Vectors in a lane from which on a graph is begun; it serves from twice as many on, at the
    latest. Until then the lane is searched exactly."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name == "ef_search" and self.ef_search is None:
                continue
            minimum = 2 if item.name == "m" else 1
            check_whole_number(item.name, getattr(self, item.name), minimum=minimum)


def default_ef_search(count: int) -> int:
    """Give the candidates to look at for a recall of 0.95, with ``k`` 16, of ``count`` vectors.

    Fitted to SmolLM2's reading of novels, 4,096 to 262,144 vectors, the other options as they are.
    """
    return max(128, 8 * math.isqrt(count) // 5)


class GraphLane:
    """The graphs over one lane of a `KeyBuffer`.

    Attributes:
        current: the graph that is searched, which holds every vector of the lane; None: there is
            none yet.
        following: the one that will take its place, which holds the newest.

    Args:
        options: how graphs are made.
    """

    def __init__(self, options: HnswlibOptions) -> None:
        self.current: Graph | None = None
        self.following: Graph | None = None
        self._options = options

    def clear(self) -> None:
        """Forget all graphs."""
        self.current = self.following = None

    def follow(self, buffer: KeyBuffer, lane: int, moments: QueryMoments, n_queries: int) -> None:
        """Take in what was added to a lane of the buffer since, and what was dropped from it.

        Args:
            buffer: the stored vectors.
            lane: which lane of it.
            moments: what the lane was asked so far.
            n_queries: of the search that is about to run.
        """
        count, first_id = int(buffer.counts[lane]), int(buffer.first_ids[lane])
        # Half the threshold on the way down, or a full lane near it would begin at every write.
        if count < (self._options.exact_below + 1) // 2:
            self.clear()
            return
        end = first_id + count
        for graph in (self.current, self.following):
            if graph is not None and graph.next_id < first_id:
                self.clear()  # Everything was replaced since, so that nothing leads up to it.
        for graph in (self.current, self.following):
            if graph is not None:
                graph.add(buffer.between(lane, graph.next_id, end), graph.next_id)
                graph.remove_before(first_id)
        self._replace(first_id)
        known = int(moments.counts[lane])
        if self._needs_following(count, known):
            self.following = self._begin(buffer, lane, moments)
        self._catch_up(buffer, lane, n_queries if self._is_outdated(known) else 0)
        self._replace(first_id)

    def search(self, queries: Tensor, k: int, *, threads: int) -> Tensor | None:
        """Find the ids ``(q, k)`` of the best vectors, or None without a graph that reaches ``k``.

        Args:
            queries: ``(q, dim)``, float32, as they came.
            k: at most the vectors of the lane.
            threads: how many share the queries.
        """
        if self.current is None:
            return None
        return self.current.search(queries, k, threads=threads)

    def _needs_following(self, count: int, known: int) -> bool:
        if self.following is not None:
            return False
        if self.current is None:
            return count >= self._options.exact_below
        return self.current.removed > 0 or self._is_outdated(known)

    def _is_outdated(self, known: int) -> bool:
        return self.current is not None and self.current.fitted_to < QueryMoments.ENOUGH <= known

    def _begin(self, buffer: KeyBuffer, lane: int, moments: QueryMoments) -> Graph:
        count, first_id = int(buffer.counts[lane]), int(buffer.first_ids[lane])
        end = first_id + count
        # Newest and oldest alike, and not all of them: copies of a whole lane take long.
        step = -(-count // SAMPLE)
        sample = buffer.at(lane, torch.arange(first_id, end, step))
        return Graph(
            KeySpace.of(sample, moments.of(lane)),
            self._options,
            fitted_to=int(moments.counts[lane]),
            next_id=end,
            capacity=2 * count,  # While the lane turns over once, as many again are added.
        )

    def _catch_up(self, buffer: KeyBuffer, lane: int, allowed: int) -> None:
        """Add older vectors to the following graph: ``allowed``, or more if they cannot wait."""
        if self.following is None:
            return
        count, first_id = int(buffer.counts[lane]), int(buffer.first_ids[lane])
        if self.current is None:
            writes_left = 2 * self._options.exact_below - count
        else:
            writes_left = count - self.current.removed
        first_held = self.following.first_id
        missing = first_held - first_id
        behind = min(missing, max(allowed, missing - writes_left))
        older = buffer.between(lane, first_held - behind, first_held)
        self.following.add(older, first_held - behind)

    def _replace(self, first_id: int) -> None:
        if self.following is not None and self.following.first_id <= first_id:
            self.current, self.following = self.following, None


class Graph:
    """A graph over consecutive ids, its labels.

    Attributes:
        first_id: the smallest id in it.
        next_id: one past the largest.
        removed: how many are marked as removed: the smallest ones.
        fitted_to: queries that its space was fitted to.

    Args:
        space: in which it is made.
        options: how.
        fitted_to: see above.
        next_id: of the vector that is added first, unless older ones are.
        capacity: vectors to have room for at first.
    """

    def __init__(
        self,
        space: KeySpace,
        options: HnswlibOptions,
        *,
        fitted_to: int,
        next_id: int,
        capacity: int,
    ) -> None:
        import hnswlib

        self.fitted_to = fitted_to
        self.first_id = self.next_id = next_id
        self.removed = 0
        self._space = space
        self._ef_search = options.ef_search
        self._index = hnswlib.Index(space="ip", dim=len(space.mean) + 1)
        self._index.init_index(
            max_elements=capacity,
            M=options.m,
            ef_construction=options.ef_construction,
            random_seed=0,
        )

    def __len__(self) -> int:
        """Count the vectors in it, removed ones included."""
        return self.next_id - self.first_id

    def add(self, keys: Tensor, first_id: int) -> None:
        """Insert vectors ``(n, dim)`` whose ids go on where the graph's end, or lead up to them."""
        n = len(keys)
        if not n:
            return
        if len(self) + n > self._index.get_max_elements():
            self._index.resize_index(max(len(self) + n, 2 * self._index.get_max_elements()))
        labels = torch.arange(first_id, first_id + n)
        # One thread: the order of insertion shapes the graph, and is to be the same each time.
        self._index.add_items(self._space.lifted_keys(keys).numpy(), labels.numpy(), num_threads=1)
        self.first_id = min(self.first_id, first_id)
        self.next_id = max(self.next_id, first_id + n)

    def remove_before(self, first_id: int) -> None:
        """Mark all vectors of smaller ids as removed."""
        first_left = self.first_id + self.removed
        for label in range(first_left, min(first_id, self.next_id)):
            self._index.mark_deleted(label)
            self.removed += 1

    def search(self, queries: Tensor, k: int, *, threads: int) -> Tensor | None:
        """Give ids ``(q, k)``, or None where a query does not reach ``k`` vectors."""
        vectors = self._space.lifted_queries(queries).numpy()
        candidates = self._ef_search or default_ef_search(len(self) - self.removed)
        self._index.set_ef(max(candidates, k))
        try:
            labels, _ = self._index.knn_query(vectors, k, num_threads=threads)
        except RuntimeError as error:
            # What hnswlib says when a query met fewer than k vectors that are not removed.
            if "contiguous 2D array" not in str(error):
                raise
            return None
        return torch.from_numpy(labels.astype("int64"))
