"""The tokens that wait, for their chunk or their window, and cutting tokens into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlayer.memory.ring import Chunks


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Tokens on their way into a memory.

    Attributes:
        keys: ``(layers, rows, H_kv, T, D)``.
        values: likewise.
        sources: ``(rows, T, 3)``, int64, CPU. Token id, document number, offset in the document.
        mask: ``(rows, T)``, bool, False for padding; None where all are real.
    """

    keys: Tensor
    values: Tensor
    sources: Tensor
    mask: Tensor | None

    def part(self, tokens: slice) -> NewTokens:
        """Give some of the tokens, no copy."""
        return NewTokens(
            keys=self.keys[:, :, :, tokens],
            values=self.values[:, :, :, tokens],
            sources=self.sources[:, tokens],
            mask=None if self.mask is None else self.mask[:, tokens],
        )


class WaitingTokens:
    """The newest tokens of each row, in the precision that they came in.

    These are the O that a window still contains, and fewer than C whose chunk is not whole.

    Args:
        shape: memory layers, rows, key/value heads, tokens per chunk, head_dim.
        overlap: O.
        dtype: of waiting keys and values: at least float32, for the mean of their chunk.
        device: where they lie. Sources lie on the CPU always.

    Attributes:
        keys: ``(layers, rows, H_kv, O + C - 1, D)``.
        values: likewise.
        sources: ``(rows, O + C - 1, 3)``, int64, CPU.
        lengths: ``(rows,)``, int64, CPU. How many of them are real.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        overlap: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers, rows, heads, chunk_size, head_dim = shape
        self.chunk_size = chunk_size
        self.overlap = overlap
        self.room = overlap + chunk_size - 1
        self.keys = torch.zeros(
            layers, rows, heads, self.room, head_dim, dtype=dtype, device=device
        )
        self.values = torch.zeros_like(self.keys)
        self.sources = torch.full((rows, self.room, 3), -1)
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    def clear(self, rows: Tensor) -> None:
        """Forget what these rows have waiting."""
        self.lengths[rows] = 0

    def lengths_for_chunks(self) -> Tensor:
        """Count the tokens that wait for their chunk alone: ``(rows,)``, int64, CPU."""
        return (self.lengths - self.overlap).clamp(min=0)

    def cut(self, new: NewTokens) -> Chunks:
        """Join waiting and new tokens, give the whole chunks and keep the rest waiting."""
        order, lengths = self._packing(new)
        keys = _pack(self.keys, new.keys, order)
        values = _pack(self.values, new.values, order)
        sources = new.sources
        if order is not None:
            sources = _take_sources(torch.cat([self.sources, sources], dim=1), order)
        left = (lengths - self.overlap).clamp(min=0)
        whole = torch.div(left, self.chunk_size, rounding_mode="floor")
        self._keep(keys, values, sources, whole, lengths)
        most = int(whole.max())
        used, shape = most * self.chunk_size, (most, self.chunk_size)
        chunk_keys = keys[:, :, :, :used].unflatten(3, shape)
        return Chunks(
            keys=chunk_keys,
            values=values[:, :, :, :used].unflatten(3, shape),
            chunk_keys=chunk_keys.float().mean(dim=-2),
            sources=sources[:, :used].unflatten(1, shape),
            counts=whole,
        )

    def _packing(self, new: NewTokens) -> tuple[Tensor | None, Tensor]:
        """Say how a row's waiting and new tokens become one sequence without gaps.

        Returns:
            The order ``(rows, O + C - 1 + T)``, CPU, in which to take them, or None if nothing
            waits and nothing is padding; and how many there are in each row, ``(rows,)``.
        """
        tokens, mask = new.keys.shape[3], new.mask
        if mask is None and not self.lengths.any():
            return None, torch.full_like(self.lengths, tokens)
        waiting = torch.arange(self.room) < self.lengths.unsqueeze(1)
        if mask is None:
            mask = torch.ones(len(self.lengths), tokens, dtype=torch.bool)
        real = torch.cat([waiting, mask.cpu()], dim=1)
        return torch.argsort(~real, dim=1, stable=True), real.sum(dim=1)

    def _keep(
        self, keys: Tensor, values: Tensor, sources: Tensor, whole: Tensor, lengths: Tensor
    ) -> None:
        start = (whole * self.chunk_size).unsqueeze(1) + torch.arange(self.room)
        start = start.clamp(max=keys.shape[3] - 1)
        precision = self.keys.dtype
        self.keys = _take(keys, start).to(precision)
        self.values = _take(values, start).to(precision)
        self.sources = _take_sources(sources, start)
        self.lengths = lengths - whole * self.chunk_size


def _pack(waiting: Tensor, new: Tensor, order: Tensor | None) -> Tensor:
    """Join waiting and new tokens of every row, real ones first."""
    if order is None:
        return new
    return _take(torch.cat([waiting, new.to(waiting.dtype)], dim=3), order)


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """Pick tokens: ``(layers, rows, H, T, D)`` by ``(rows, n)`` -> ``(layers, rows, H, n, D)``."""
    layers, rows, heads, _, dim = tokens.shape
    index = order.to(tokens.device).view(1, rows, 1, -1, 1)
    return torch.gather(tokens, 3, index.expand(layers, rows, heads, order.shape[1], dim))


def _take_sources(sources: Tensor, order: Tensor) -> Tensor:
    """Pick sources: ``(rows, T, 3)`` by ``(rows, n)`` -> ``(rows, n, 3)``."""
    return torch.gather(sources, 1, order.unsqueeze(2).expand(*order.shape, 3))
