"""Exact scores of candidates, for engines whose own scores are approximate.

An engine that keeps half-width or quantised vectors, or a graph of them, finds more candidates than
are asked for; their float32 products with the vectors of the `KeyBuffer` then decide.

    engine.search(queries, 2 * k) ─► ids (lanes, q, c) ─► best_of ─► scores, ids (lanes, q, k)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memlayer_backends.key_buffer import KeyBuffer

CPU_BLOCK_BYTES = 4 * 2**20
"""Vectors that are copied together out of a buffer on the CPU: about its cache."""

GPU_BLOCK_BYTES = 128 * 2**20
"""The same on a GPU, where every block costs a few launches."""


def best_of(buffer: KeyBuffer, queries: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` best of each query's candidates by their exact scores.

    Ids that the buffer does not hold, such as -1 or those of vectors that were dropped, count as
    missing, so an engine may be late to forget.

    Args:
        buffer: the stored vectors.
        queries: ``(lanes, q, dim)``, float32, where the buffer is.
        ids: ``(lanes, q, c)``, int64, where the buffer is. Candidates, all that are held distinct
            within a query; in any order.
        k: at least 1; may be more than c.

    Returns:
        Scores, float32, falling, ``-inf`` where there are fewer than ``k``, and ids, int64, -1
        there; both ``(lanes, q, k)``.
    """
    scores = exact_scores(buffer, queries, ids)
    found = min(k, ids.shape[2])
    best, which = scores.topk(found)
    chosen = ids.gather(2, which).masked_fill_(best == -torch.inf, -1)
    if found == k:
        return best, chosen
    padding = (0, k - found)
    return (
        torch.nn.functional.pad(best, padding, value=-torch.inf),
        torch.nn.functional.pad(chosen, padding, value=-1),
    )


def exact_scores(buffer: KeyBuffer, queries: Tensor, ids: Tensor) -> Tensor:
    """Give the inner products of each query with its candidates, in the order of the candidates.

    Vectors are copied out of the buffer a few MiB at a time, never ``lanes * q * c`` at once.

    Args:
        buffer: the stored vectors.
        queries: ``(lanes, q, dim)``, float32, where the buffer is.
        ids: ``(lanes, q, c)``, int64, where the buffer is.

    Returns:
        ``(lanes, q, c)``, float32; ``-inf`` for ids that the buffer does not hold.
    """
    lanes, capacity, dim = buffer.keys.shape
    q, c = ids.shape[1:]
    scores = queries.new_full((lanes * q, c), -torch.inf)
    if not capacity or not scores.numel():
        return scores.view(lanes, q, c)
    occupancy = buffer.occupancy()
    held = occupancy.holds(ids)
    first = torch.arange(0, lanes * capacity, capacity, device=ids.device)[:, None, None]
    rows = torch.where(held, occupancy.slots(ids) + first, 0).flatten(0, 1)  # (lanes * q, c)
    vectors = buffer.keys.flatten(0, 1)
    queries = queries.reshape(lanes * q, 1, dim)
    # As many queries at a time as fit, and of one with very many candidates not all at once.
    fit = max(1, (CPU_BLOCK_BYTES if ids.device.type == "cpu" else GPU_BLOCK_BYTES) // (4 * dim))
    wide = min(c, fit)
    tall = fit // wide
    for top in range(0, lanes * q, tall):
        some = queries[top : top + tall]
        for left in range(0, c, wide):
            part = rows[top : top + tall, left : left + wide]
            gathered = vectors.index_select(0, part.flatten()).view(*part.shape, dim).float()
            products = torch.bmm(some, gathered.transpose(1, 2)).squeeze(1)
            scores[top : top + tall, left : left + wide] = products
    return scores.view(lanes, q, c).masked_fill_(~held, -torch.inf)
