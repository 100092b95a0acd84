"""Exact search in blocks: products, maxima of groups, the best groups, the best of them.

    queries ─┐
    keys ────┴► scores of a block ─► maxima of 64 ─► best groups ─► best k ─► merged over blocks

A score outside of the ``k`` groups with the largest maxima is at most its own group's maximum, so
at least ``k`` others are as large: nothing is missed. Scores never go out to memory whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlayer_backends.key_buffer import GROUP, Occupancy


@dataclass(frozen=True, kw_only=True)
class Block:
    """How much is searched at a time.

    Attributes:
        lanes: lanes of one block.
        queries: queries of each of these lanes.
        slots: slots of each of these lanes, a multiple of `GROUP`.
        step: slots of one product, a multiple of `GROUP`; smaller than ``slots`` only where
            ``lanes`` is 1.
    """

    lanes: int
    queries: int
    slots: int
    step: int


@dataclass(frozen=True, kw_only=True)
class BlockedSearch:
    """A search of all lanes.

    Attributes:
        keys: ``(lanes, capacity, dim)``, any float dtype, in which all is computed. Free slots hold
            anything, NaN included.
        occupancy: which slots hold vectors.
        block: how much is searched at a time.
        memory: ``(b,)``, likewise. Where the scores of a block are, one block after the other:
            fresh pages for every block take longer than its products.
    """

    keys: Tensor
    occupancy: Occupancy
    block: Block
    memory: Tensor

    def best(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Give the ``k`` largest scores of ``(lanes, q, dim)``, and their slots: ``(lanes, q, k)``.

        Args:
            queries: of the dtype of the keys.
            k: at most the slots.
        """
        lanes, q, _ = queries.shape
        block = self.block
        if block.lanes >= lanes and block.queries >= q:
            return self._best_of_rows(queries, 0, k)
        scores = queries.new_empty(lanes, q, k)
        slots = queries.new_empty(lanes, q, k, dtype=torch.int64)
        for lane in range(0, lanes, block.lanes):
            for query in range(0, q, block.queries):
                part = slice(lane, lane + block.lanes), slice(query, query + block.queries)
                scores[part], slots[part] = self._best_of_rows(queries[part], lane, k)
        return scores, slots

    def _best_of_rows(self, queries: Tensor, lane: int, k: int) -> tuple[Tensor, Tensor]:
        """Search for the queries ``(l, q, dim)`` of one block, whose first lane is ``lane``."""
        n_slots, size = self.occupancy.n_slots, self.block.slots
        values, slots = [], []
        for start in range(0, n_slots, size):
            stop = min(start + size, n_slots)
            scores, maxima = self._scores(queries, lane, start, stop)
            best, positions = top_k(scores, maxima, min(k, stop - start))
            values.append(best)
            slots.append(positions + start if start else positions)
        shape = (*queries.shape[:2], k)
        if len(values) == 1:
            return values[0].view(shape), slots[0].view(shape)
        merged = torch.cat(values, 1).topk(k)
        return merged.values.view(shape), torch.cat(slots, 1).gather(1, merged.indices).view(shape)

    def _scores(self, queries: Tensor, lane: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Give scores ``(l * q, stop - start)`` and maxima ``(l * q, groups)``; free: ``-inf``."""
        lanes, q, _ = queries.shape
        n, step = stop - start, self.block.step
        keys = self.keys[lane : lane + lanes, start:stop]
        if lanes > 1 or n <= step:
            scores = self.memory[: lanes * q * n].view(lanes, q, n)
            torch.bmm(queries, keys.transpose(1, 2), out=scores)
            self._forget_free(scores, lane, start)
            rows = scores.view(lanes * q, n)
            return rows, rows.view(-1, n // GROUP, GROUP).amax(-1)
        # Rows end with a group that is never looked at: if they lay a power of two apart, they
        # would share a few places of the cache.
        rows = self.memory[: q * (n + GROUP)].view(q, n + GROUP)[:, :n]
        maxima = queries.new_empty(q, n // GROUP)
        for begin in range(0, n, step):
            part = rows[:, begin : begin + step]
            torch.mm(queries[0], keys[0, begin : begin + step].T, out=part)
            self._forget_free(part[None], lane, start + begin)
            groups = part.unflatten(1, (-1, GROUP))
            torch.amax(groups, 2, out=maxima[:, begin // GROUP : (begin + step) // GROUP])
        return rows, maxima

    def _forget_free(self, scores: Tensor, lane: int, start: int) -> None:
        """Set the scores ``(l, q, n)`` of free slots from slot ``start`` on to ``-inf``."""
        occupancy = self.occupancy
        begin = max(start, occupancy.free_start)
        end = min(start + scores.shape[2], occupancy.free_stop)
        if begin < end:
            first = occupancy.free_start
            free = occupancy.free[lane : lane + len(scores), None, begin - first : end - first]
            scores[..., begin - start : end - start].masked_fill_(free, -torch.inf)


def block_memory(block: Block) -> int:
    """Give the number of scores that a `BlockedSearch` needs memory for."""
    return block.lanes * block.queries * (block.slots + GROUP)


def top_k(scores: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` largest scores of each row and their positions, largest first.

    Args:
        scores: ``(rows, n)``, n a multiple of `GROUP`; rows a multiple of `GROUP` apart in memory.
        maxima: ``(rows, n // GROUP)``. The largest score of each group.
        k: at most n.

    Returns:
        Scores and positions, ``(rows, k)``.
    """
    if maxima.shape[1] < 2 * k:
        values, positions = scores.topk(k)
        return values, positions
    groups = maxima.topk(k, sorted=False).indices
    apart = scores.stride(0) // GROUP
    in_memory = torch.as_strided(scores, (len(scores) * apart, GROUP), (GROUP, 1))
    rows = torch.arange(0, len(scores) * apart, apart, device=scores.device)[:, None]
    candidates = in_memory.index_select(0, (rows + groups).flatten()).view(len(scores), -1)
    values, chosen = candidates.topk(k)
    return values, groups.gather(1, chosen // GROUP) * GROUP + chosen % GROUP
