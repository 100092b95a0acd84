"""What the two faiss backends share: exact search of one lane after the other.

A flat index is an array and a search of it, so the array is the ring that every backend keeps, and
faiss's search is called on it where it lies. So nothing is ever removed from an index, which GPU
indexes cannot do and which shifts the ids of the others.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from memlayer_backends.buffered import BufferedBackend


class FaissFlatBackend(BufferedBackend):
    """Exact search with faiss, lane by lane."""

    @property
    def exact(self) -> bool:
        """Always."""
        return True

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
        shape = (self.lanes, queries.shape[1], k)
        scores = queries.new_full(shape, -torch.inf)
        slots = torch.zeros(shape, dtype=torch.int64, device=queries.device)
        for lane in range(self.lanes):
            best, where = self._search_lane(lane, queries[lane], k)
            scores[lane, :, : best.shape[1]] = best
            slots[lane, :, : best.shape[1]] = where
        return scores, self.buffer.occupancy().ids(slots)

    def _search_lane(self, lane: int, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        keys = self.buffer.keys[lane]
        scores, slots = [queries.new_empty(len(queries), 0)], []
        for start, stop in self.buffer.pieces(lane):
            best, where = self._nearest(queries, keys[start:stop], min(k, stop - start))
            scores.append(best.masked_fill(where < 0, -torch.inf))
            slots.append(where + start)
        if len(slots) < 2:
            return scores[-1], slots[-1] if slots else scores[-1].long()
        best, where = torch.cat(scores, 1).topk(min(k, int(self.buffer.counts[lane])))
        return best, torch.cat(slots, 1).gather(1, where)
