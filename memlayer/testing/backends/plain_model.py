"""The plainest thing that does what a backend does, to compare backends with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memlayer.retrieval import SearchResult


class PlainModel:
    """What a backend should hold.

    Attributes:
        keys: one ``(n, dim)`` float64 tensor on the CPU for each lane, oldest first.
        first_ids: the id of each lane's oldest vector.
    """

    def __init__(self, *, lanes: int, dim: int) -> None:
        self.keys = [torch.empty(0, dim, dtype=torch.float64) for _ in range(lanes)]
        self.first_ids = [0] * lanes

    def add(self, keys: Tensor, lanes: Sequence[int]) -> None:
        """Append ``(len(lanes), n, dim)``."""
        for row, lane in enumerate(lanes):
            self.keys[lane] = torch.cat([self.keys[lane], keys[row].detach().cpu().double()])

    def remove_oldest(self, n: int, lanes: Sequence[int]) -> None:
        """Drop the ``n`` oldest vectors of each of these lanes."""
        for lane in lanes:
            self.keys[lane] = self.keys[lane][n:]
            self.first_ids[lane] += n

    def clear(self, lanes: Sequence[int]) -> None:
        """Drop all vectors of these lanes and number from 0 again."""
        for lane in lanes:
            self.keys[lane] = self.keys[lane][:0]
            self.first_ids[lane] = 0

    def counts(self) -> list[int]:
        """Give the number of vectors of each lane."""
        return [len(keys) for keys in self.keys]

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Search exactly, in lanes that all hold at least ``k`` vectors.

        Args:
            queries: ``(lanes, q, dim)``, any float dtype and device; the result is on that device.
            k: vectors to find per query.
        """
        scores, ids = [], []
        for lane, keys in enumerate(self.keys):
            best = (queries[lane].cpu().double() @ keys.T).topk(k)
            scores.append(best.values.float())
            ids.append(best.indices + self.first_ids[lane])
        return SearchResult(
            scores=torch.stack(scores).to(queries.device), ids=torch.stack(ids).to(queries.device)
        )
