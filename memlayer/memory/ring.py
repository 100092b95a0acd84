"""The ring that holds whole chunks of keys and values.

Chunks of a row are numbered 0, 1, 2, ... from its last clear; chunk ``i`` lies in slot
``(base + i) % slots``. Appending overwrites the oldest slots, so nothing is ever moved. The ring
has more slots than the bank's capacity (the slack), so that what one forward retrieved is still
there for its backward pass after one more segment was written.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_SLOTS = 256


class ChunkRing:
    """Whole chunks of several rows and memory layers, the oldest overwritten first.

    Args:
        shape: memory layers, rows, key/value heads, tokens per chunk, head_dim.
        slots: chunks per row that fit before the oldest is overwritten.
        dtype: of the stored keys and values.
        device: where they lie.

    Attributes:
        keys: ``(layers, rows, H_kv, slots, C, D)``. Grows by doubling up to ``slots``.
        values: likewise.
        base: ``(rows,)``, int64, CPU. Chunks ever written before the row's last clear.
        written: ``(rows,)``, int64, CPU. Chunks written since.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers, rows, heads, chunk_size, head_dim = shape
        self.max_slots = slots
        now = min(slots, _FIRST_SLOTS)
        self.keys = torch.zeros(
            layers, rows, heads, now, chunk_size, head_dim, dtype=dtype, device=device
        )
        self.values = torch.zeros_like(self.keys)
        self.base = torch.zeros(rows, dtype=torch.int64)
        self.written = torch.zeros(rows, dtype=torch.int64)

    @property
    def slots(self) -> int:
        """Chunks per row for which there is room now."""
        return self.keys.shape[3]

    def append(self, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Write each row's next chunks.

        Args:
            keys: ``(layers, rows, H_kv, n, C, D)``.
            values: likewise.
            counts: ``(rows,)``, int64, CPU. Only the first ``counts[b]`` of ``n`` are written.
        """
        self._make_room(int((self.base + self.written + counts).max()))
        row, chunk = torch.nonzero(torch.arange(keys.shape[3]) < counts.unsqueeze(1), as_tuple=True)
        slot = (self.base[row] + self.written[row] + chunk) % self.slots
        row, chunk, slot = (index.to(self.keys.device) for index in (row, chunk, slot))
        # Index arrays apart from each other put their axis first on both sides alike.
        self.keys[:, row, :, slot] = keys[:, row, :, chunk].to(self.keys.dtype)
        self.values[:, row, :, slot] = values[:, row, :, chunk].to(self.values.dtype)
        self.written += counts

    def clear(self, rows: Tensor) -> None:
        """Start these rows' numbering again at 0; their chunks stay until they are overwritten."""
        self.base[rows] += self.written[rows]
        self.written[rows] = 0

    def locate(self, ids: Tensor) -> Tensor:
        """Find chunks in the ring, flattened over rows, heads and slots.

        Args:
            ids: ``(rows, H_kv, ...)``, int64, chunk numbers, each still in the ring.

        Returns:
            Same shape: positions in ``keys[layer].flatten(0, 2)``.
        """
        rows, heads = ids.shape[:2]
        trailing = (1,) * (ids.dim() - 2)
        base = self.base.to(ids.device).view(rows, 1, *trailing)
        lane = torch.arange(rows * heads, device=ids.device).view(rows, heads, *trailing)
        return lane * self.slots + (base + ids) % self.slots

    def _make_room(self, needed: int) -> None:
        if needed <= self.slots or self.slots == self.max_slots:
            return
        # Below max_slots nothing has wrapped yet, so growing keeps every slot's number.
        slots = min(self.max_slots, max(needed, 2 * self.slots))
        self.keys, self.values = (_longer(held, slots) for held in (self.keys, self.values))


def _longer(held: Tensor, slots: int) -> Tensor:
    shape = list(held.shape)
    shape[3] = slots
    grown = held.new_zeros(shape)
    grown[:, :, :, : held.shape[3]] = held
    return grown
