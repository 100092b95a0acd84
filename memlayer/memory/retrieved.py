"""What a search of the memory found, without a copy of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        places: ``(B, H, T, n)``, int64. Rows of ``keys`` and ``values``; valid where not found too.
        keys: ``(places, C, D)``. The ring of one memory layer, flattened; not a copy.
        values: likewise.
        intact: whether what was found is still there, to be asked before it is read again.
    """

    ids: Tensor
    scores: Tensor
    found: Tensor
    places: Tensor
    keys: Tensor
    values: Tensor
    intact: Callable[[], bool]

    def gather(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copy out everything found; for a few queries only, since this is K times their size.

        Returns:
            Keys and values, each ``(B, H, T, K, D)``, and the mask ``(B, H, T, K)``, bool, of
            those that were found.
        """
        chunk_size, head_dim = self.keys.shape[-2:]
        shape = (*self.ids.shape[:3], -1)
        keys = self.keys[self.places].reshape(*shape, head_dim)
        values = self.values[self.places].reshape(*shape, head_dim)
        return keys, values, self.found.repeat_interleave(chunk_size, dim=-1)
