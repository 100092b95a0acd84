"""Weights on disk in less than their width: half precision, or 8 bits and a scale a row.

Matrices only: norms, biases, gates and slopes are few, and their rounding would be felt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"
"""Ends the name of the ``(rows,)`` float32 factors of an 8-bit matrix."""


def narrow(weights: Mapping[str, Tensor], dtype: torch.dtype | str | None) -> dict[str, Tensor]:
    """Give the weights as they go to disk.

    Args:
        weights: any float dtype.
        dtype: of matrices; ``"int8"`` or ``torch.int8`` for whole numbers from -127 to 127, the
            largest of each row being 127. None: as they are.

    Raises:
        ConfigError: if the dtype is unknown.
    """
    from memlayer.backbones import parse_dtype

    if dtype is None:
        return dict(weights)
    if dtype in ("int8", torch.int8):
        written: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if weight.dim() < 2:
                written[name] = weight
            else:
                written[name], written[name + SCALE] = _rounded(weight.float())
        return written
    width = parse_dtype(dtype)
    return {name: value.to(width) if value.dim() > 1 else value for name, value in weights.items()}


def widen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn 8-bit matrices back into float32 ones; the rest stays as it was read."""
    scales = {
        name.removesuffix(SCALE)
        for name in weights
        if name.endswith(SCALE) and weights.get(name.removesuffix(SCALE)) is not None
    }
    whole: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in scales and weight.dtype == torch.int8:
            factor = weights[name + SCALE]
            if factor.shape == weight.shape[:1]:
                whole[name] = weight.float() * factor.view(-1, *[1] * (weight.dim() - 1))
                continue
        if name.removesuffix(SCALE) not in scales:
            whole[name] = weight
    return whole


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Give whole numbers of the matrix's shape, and the factor ``(rows,)`` of each row."""
    largest = weight.flatten(1).abs().amax(1)
    factor = (largest / 127).where(largest > 0, torch.ones_like(largest))
    spread = factor.view(-1, *[1] * (weight.dim() - 1))
    return (weight / spread).round().clamp(-127, 127).to(torch.int8), factor
