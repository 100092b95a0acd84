"""Approximate search with usearch: one graph per lane, of float32, float16 or int8 vectors."""

import threading
from dataclasses import dataclass

import numpy as np
import torch
from usearch.index import Index

from memlayer import ConfigError
from memlayer_backends.buffered import BufferedBackend
from memlayer_backends.key_space import KeySpace, QueryMoments
from memlayer_backends.rescoring import best_of

FEW = 64  # vectors that are looked at one by one


@dataclass(frozen=True, kw_only=True)
class UsearchOptions:
    """What ``backend_options`` may hold."""

    storage: str = "f16"  # of the graph's vectors: "f32", "f16" or "i8"
    connectivity: int = 16
    expansion_add: int = 128
    expansion_search: int = 128

    def __post_init__(self):
        if self.storage not in ("f32", "f16", "i8"):
            raise ConfigError(f"storage must be 'f32', 'f16' or 'i8', got {self.storage!r}")


class UsearchBackend(BufferedBackend):
    """Graphs find candidates, the float32 vectors that `BufferedBackend` keeps decide."""

    name = "usearch"
    options_type = UsearchOptions
    keeps_keys_on_cpu = True

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self._graphs = [None] * self.lanes
        self._moments = QueryMoments(lanes=self.lanes, dim=self.dim)
        self._searching = threading.Lock()  # usearch wants one search of a graph at a time

    def search_keys(self, queries, k):
        """Search each lane, in a graph that has followed what was written since."""
        wide = max(2 * k, FEW)
        candidates = torch.full((self.lanes, queries.shape[1], wide), -1)
        with self._searching:
            self._moments.note(queries)
            for lane, count in enumerate(self.buffer.counts.tolist()):
                if count > wide:
                    candidates[lane] = self._graph(lane).search(queries[lane], wide)
                else:
                    candidates[lane, :, :count] = self.buffer.first_ids[lane] + torch.arange(count)
        return best_of(self.buffer, queries, candidates, k)

    def _graph(self, lane):
        first, count = int(self.buffer.first_ids[lane]), int(self.buffer.counts[lane])
        graph = self._graphs[lane]
        if graph is None or not graph.can_follow(first, first + count):
            keys = self.buffer.live(torch.tensor([lane]))
            space = KeySpace.of(keys, self._moments.of(lane))
            graph = self._graphs[lane] = _Graph(space, first, 2 * count, self.options)
        graph.follow(self.buffer.between(lane, graph.stop, first + count), first)
        return graph

    def clear(self, lanes=None):
        """Drop all vectors of the given lanes."""
        super().clear(lanes)
        for lane in range(self.lanes) if lanes is None else lanes:
            self._graphs[lane] = None

    def rebuild(self):
        """Forget the graphs of other vectors; new ones are made when they are searched."""
        self._graphs = [None] * self.lanes


class _Graph:
    """A usearch index of the ids from `start` to `stop`, of which the first are removed."""

    def __init__(self, space, first_id, limit, options):
        self._begun_at = self.start = self.stop = first_id
        self._space, self._limit = space, limit
        # usearch's own int8 would lose the lengths of vectors; in the space, 1 is the longest.
        self._is_int8 = options.storage == "i8"
        self._index = Index(
            ndim=len(space.mean) + 1,
            metric="ip",
            dtype=options.storage,
            connectivity=options.connectivity,
            expansion_add=options.expansion_add,
            expansion_search=options.expansion_search,
        )

    def can_follow(self, first_id, end):
        """Say no once half of all that was ever added is of the past, or new to its space."""
        return self.start <= first_id <= self.stop and end - self._begun_at <= self._limit

    def follow(self, new_keys, first_id):
        """Add the newest vectors, and remove those before an id."""
        if len(new_keys):
            labels = torch.arange(self.stop, self.stop + len(new_keys))
            vectors = self._stored(self._space.lifted_keys(new_keys))
            self._index.add(labels.numpy(), vectors, threads=1)
            self.stop += len(new_keys)
        if first_id > self.start:
            self._index.remove(torch.arange(self.start, first_id).numpy())
            self.start = first_id

    def search(self, queries, k):
        """Give ids ``(q, k)``, all of them valid."""
        vectors = self._stored(self._space.lifted_queries(queries))
        for exact in (False, True):  # A graph may be in parts, so that a walk ends early.
            found = self._index.search(vectors, k, exact=exact, threads=torch.get_num_threads())
            keys = np.atleast_2d(found.keys)
            if keys.shape[1] == k and np.all(getattr(found, "counts", k) == k):
                break
        return torch.from_numpy(keys.astype("int64"))

    def _stored(self, vectors):
        return ((127 * vectors).round().to(torch.int8) if self._is_int8 else vectors).numpy()
