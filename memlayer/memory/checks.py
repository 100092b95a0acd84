"""What a memory refuses: tensors of other shapes, devices or kinds than it documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from memlayer.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory.bank import MemoryBank


def stack_layers(bank: MemoryBank, name: str, tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """Check one tensor ``(B, H_kv, T, D)`` a memory layer and join them: ``(layers, B, ...)``."""
    layers = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    if len(layers) != bank.num_layers:
        raise ShapeError(
            f"{name} must be one tensor per memory layer ({bank.num_layers}), got {len(layers)}"
        )
    for tensor in layers:
        fits = (
            tensor.dim() == 4
            and tensor.shape == layers[0].shape
            and tensor.shape[1] == bank.num_key_value_heads
            and tensor.shape[3] == bank.head_dim
        )
        if not fits:
            raise ShapeError(
                f"{name} must have shape (B, H_kv={bank.num_key_value_heads}, T, "
                f"D={bank.head_dim}), got {tuple(tensor.shape)}"
            )
        if tensor.device != bank.device:
            raise ShapeError(f"{name} must be on {bank.device}, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ShapeError(f"{name} must be floating point, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ShapeError(f"{name} must be finite, got NaN or infinity; nothing was stored")
    return torch.stack([tensor.detach() for tensor in layers])


def check_same_shape(keys: Tensor, values: Tensor) -> None:
    """Refuse stacked keys and values that differ in shape."""
    if keys.shape != values.shape:
        raise ShapeError(
            f"keys and values must have the same shape, got {tuple(keys.shape[1:])} and "
            f"{tuple(values.shape[1:])}"
        )


def check_mask(mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """Give the mask of stacked keys as bool, or None if nothing is padding."""
    if mask is None:
        return None
    expected = (keys.shape[1], keys.shape[3])
    if mask.shape != expected:
        raise ShapeError(f"mask must have shape (B, T)={expected}, got {tuple(mask.shape)}")
    mask = mask.bool()
    return None if mask.all() else mask


def check_sources(
    bank: MemoryBank, sources: Tensor | None, keys: Tensor, mask: Tensor | None
) -> Tensor:
    """Give the sources of stacked keys on the CPU; unknown ones if there are none."""
    expected = (keys.shape[1], keys.shape[3], 3)
    if sources is None:
        return torch.full(expected, -1)
    if sources.shape != expected or sources.dtype != torch.int64:
        raise ShapeError(
            f"sources must be int64 of shape (B, T, 3)={expected}, got {sources.dtype} of shape "
            f"{tuple(sources.shape)}"
        )
    sources = sources.detach().cpu()
    real = sources if mask is None else sources[mask.cpu()]
    documents = len(bank.documents)
    if real.numel() and (int(real.min()) < -1 or int(real[..., 1].max()) >= documents):
        raise ShapeError(
            f"sources must be -1 or more and name one of {documents} documents, got values from "
            f"{int(real.min())} and document {int(real[..., 1].max())}; "
            "document_number(name) adds one"
        )
    return sources


def check_rows(bank: MemoryBank, rows: int) -> None:
    """Refuse another number of rows than the memory holds."""
    if bank.rows and rows != bank.rows:
        raise ShapeError(
            f"the memory holds {bank.rows} rows, got a batch of {rows}; call memory.clear() "
            "to start again with another batch size"
        )


def check_batch(bank: MemoryBank, batch: int, expand: int) -> None:
    """Refuse to read for another batch than was memorized."""
    if batch != bank.rows * expand:
        raise ShapeError(
            f"the memory holds {bank.rows} rows, got a batch of {batch}; use the batch that "
            "was memorized, or call memory.clear() first"
        )


def check_queries(bank: MemoryBank, queries: Tensor, expand: int) -> None:
    """Refuse queries ``(B, H, T, D)`` that do not fit the memory."""
    batch, heads, _, head_dim = queries.shape
    check_batch(bank, batch, expand)
    if heads % bank.num_key_value_heads or head_dim != bank.head_dim:
        raise ShapeError(
            f"queries must have a multiple of {bank.num_key_value_heads} heads of "
            f"{bank.head_dim}, got {heads} heads of {head_dim}"
        )
