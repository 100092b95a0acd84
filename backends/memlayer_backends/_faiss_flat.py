"""What the two faiss backends share: exact search of one lane after the other.

A flat index is an array and a search of it, so the array is the ring that every backend keeps, and
faiss's search is called on it where it lies. So nothing is ever removed from an index, which GPU
indexes cannot do and which shifts the ids of the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from memlayer_backends.buffered import BufferedBackend


class FaissFlatBackend(BufferedBackend):
    """Exact search with faiss, lane by lane."""

    @abstractmethod
    def _nearest(self, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search one array.

        Args:
            queries: ``(q, dim)``, float32, contiguous.
            keys: ``(n, dim)``, float32, contiguous.
            k: at most n.

        Returns:
            Scores, falling, and positions in ``keys``, ``(q, k)``; -1 where faiss found nothing.
        """

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search one lane after the other."""
        return self._search_exactly(queries, k, range(self.lanes))

    def _search_exactly(
        self, queries: Tensor, k: int, lanes: Iterable[int]
    ) -> tuple[Tensor, Tensor]:
        """Search some of the lanes; the results of the others are ``-inf`` and -1.

        Args:
            queries: ``(self.lanes, q, dim)``, as for `search_keys`.
            k: as for `search_keys`.
            lanes: those to search.

        Returns:
            Scores and ids, ``(self.lanes, q, k)``.
        """
        shape = (self.lanes, queries.shape[1], k)
        scores = queries.new_full(shape, -torch.inf)
        slots = torch.full(shape, -1, device=queries.device)
        for lane in lanes:
            best, where = self._search_lane(lane, queries[lane], k)
            scores[lane, :, : best.shape[1]] = best
            slots[lane, :, : best.shape[1]] = where
        missing = slots < 0
        ids = self.buffer.occupancy().ids(slots)
        return scores.masked_fill_(missing, -torch.inf), ids.masked_fill_(missing, -1)

    def _search_lane(self, lane: int, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        keys = self.buffer.keys[lane]
        found = []
        for start, stop in self.buffer.pieces(lane):
            best, where = self._nearest(queries, keys[start:stop], min(k, stop - start))
            found.append(
                (best, where.add_(start).masked_fill_(where < start, -1) if start else where)
            )
        if not found:
            nothing = queries.new_empty(len(queries), 0)
            return nothing, nothing.long()
        if len(found) == 1:
            return found[0]
        slots = torch.cat([where for _, where in found], 1)
        scores = torch.cat([best for best, _ in found], 1).masked_fill_(slots < 0, -torch.inf)
        best, which = scores.topk(min(k, int(self.buffer.counts[lane])))
        return best, slots.gather(1, which)
