"""How much of the true best a search found."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**24
"""Scores held at a time."""


def kth_scores(keys: Tensor, queries: Tensor, k: int) -> Tensor:
    """Give the ``k``-th largest inner product of every query, in float32.

    Args:
        keys: ``(lanes, n, dim)``, float32, n at least ``k``.
        queries: ``(lanes, q, dim)``, float32.
        k: at least 1.

    Returns:
        ``(lanes, q)``.
    """
    block = max(1, BLOCK // keys.shape[1])
    return torch.stack(
        [
            torch.cat([(some @ own.T).topk(k).values[:, -1] for some in asked.split(block)])
            for own, asked in zip(keys, queries, strict=True)
        ]
    )


def recall(keys: Tensor, queries: Tensor, positions: Tensor, kth: Tensor) -> float:
    """Give the share of found vectors that are as good as the ``k``-th best.

    Of vectors with nearly the same score any is right. None counts twice, and a position that does
    not exist (-1, say) counts as missed.

    Args:
        keys: ``(lanes, n, dim)``, float32.
        queries: ``(lanes, q, dim)``, float32.
        positions: ``(lanes, q, k)``, int64. Where in ``n`` the search found vectors.
        kth: ``(lanes, q)``, of `kth_scores`.
    """
    hits = 0
    slack = 1e-5 * (1 + kth.abs())
    for own, asked, where, least in zip(keys, queries, positions, kth - slack, strict=True):
        ordered = where.sort(-1).values
        valid = (ordered >= 0) & (ordered < len(own))
        valid[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        found = own[ordered.where(valid, 0)]  # (q, k, dim)
        scores = torch.einsum("qkd,qd->qk", found, asked)
        hits += int((valid & (scores >= least[:, None])).sum())
    return hits / positions.numel()
