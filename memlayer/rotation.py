"""Rotary positions, where memlayer itself has to turn a query."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys as LLaMA does: the two halves of the turned numbers are a pair's ends.

    Args:
        heads: ``(B, H, T, D)``.
        cos: ``(B or 1, T or 1, R)``. With R < D the first R numbers of a head are turned.
        sin: likewise.
    """
    size = cos.shape[-1]
    turned, rest = heads[..., :size], heads[..., size:]
    first, second = turned.chunk(2, dim=-1)
    across = torch.cat([-second, first], dim=-1)
    made = torch.addcmul(turned * cos.unsqueeze(1), across, sin.unsqueeze(1))
    return torch.cat([made, rest], dim=-1) if rest.shape[-1] else made
