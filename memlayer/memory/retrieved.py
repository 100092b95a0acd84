"""What a search of the memory found, without a copy of the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """Which chunks each query found, and where their keys and values lie.

    Attributes:
        ids: ``(B, H, T, n)``, int64. Chunk numbers in the row since its last clear, best first;
            -1 where fewer than ``n`` chunks are stored.
        scores: ``(B, H, T, n)``, float32. Inner products of query and chunk key; -inf at -1.
        found: ``(B, H, T, n)``, bool. ``ids >= 0``.
        ages: ``(B, H, T, n)``, int64. Chunks written since each one, into what its row reads; 0 is
            the newest. Any number where not found.
        written: ``(B,)``, int64. Chunks written into what each row reads, since its last clear.
        places: ``(B, H, T, n)``, int64. Positions in ``keys`` and ``values``, counted through all
            stores; valid where not found too.
        keys: stores of ``(places, C, D)``, one after the other: of one memory layer of each memory
            that was searched, flattened. Not copies, unless the memory's storage is
            ``"host"``: then each chunk that was found, once.
        values: likewise.
        intact: whether what was found is still there, to be asked before it is read again.
    """

    ids: Tensor
    scores: Tensor
    found: Tensor
    ages: Tensor
    written: Tensor
    places: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    intact: Callable[[], bool]

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """C tokens of D numbers in each chunk."""
        chunk_size, head_dim = self.keys[0].shape[1:]
        return chunk_size, head_dim

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copy out everything found; for a few queries only, since this is K times their size.

        Returns:
            Keys and values, each ``(B, H, T, K, D)``, and the mask ``(B, H, T, K)``, bool, of
            those that were found.
        """
        chunk_size, head_dim = self.chunk_shape
        shape = (*self.ids.shape[:3], -1)
        keys, values = (
            read_chunks(stores, self.places).reshape(*shape, head_dim)
            for stores in (self.keys, self.values)
        )
        return keys, values, self.found.repeat_interleave(chunk_size, dim=-1)

    def select(self, rows: Tensor) -> Retrieved:
        """Keep some batch rows, given by number ``(b,)``."""
        return replace(
            self,
            ids=self.ids[rows],
            scores=self.scores[rows],
            found=self.found[rows],
            ages=self.ages[rows],
            written=self.written[rows],
            places=self.places[rows],
        )


def read_chunks(stores: Sequence[Tensor], places: Tensor, memory: Tensor | None = None) -> Tensor:
    """Copy chunks out of stores.

    Args:
        stores: ``(places, C, D)`` each.
        places: any shape, int64, counted through all stores.
        memory: where the copy goes, of the stores' dtype and at least as many elements; new if
            None. Whoever reads block after block reuses it: fresh pages cost more than the copy.

    Returns:
        ``(*places.shape, C, D)``.
    """
    chunk_shape = stores[0].shape[1:]
    wanted = places.numel() * chunk_shape.numel()
    if memory is None:
        memory = stores[0].new_empty(wanted)
    chunks = memory[:wanted].view(-1, chunk_shape.numel())
    flat = places.reshape(-1)
    if len(stores) == 1:
        torch.index_select(stores[0].flatten(1), 0, flat, out=chunks)
    else:
        first = 0
        for store in stores:
            inside = (flat >= first) & (flat < first + len(store))
            chunks[inside] = store.flatten(1)[flat[inside] - first]
            first += len(store)
    return chunks.view(*places.shape, *chunk_shape)
