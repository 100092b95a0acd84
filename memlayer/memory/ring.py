"""The ring that holds whole chunks: their keys and values, index keys and where they came from.

Chunks of a row are numbered 0, 1, 2, ... from its last clear; chunk ``i`` lies in slot
``(base + i) % slots``. Appending overwrites the oldest slots, so nothing is ever moved. The ring
has more slots than the bank's capacity (the slack), so that what one forward retrieved is still
there for its backward pass after one more segment was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_SLOTS = 256


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Chunks of several rows, the oldest first.

    Attributes:
        keys: ``(layers, rows, H_kv, n, C, D)``.
        values: likewise.
        chunk_keys: ``(layers, rows, H_kv, n, D)``, float32. What finds each chunk.
        sources: ``(rows, n, C, 3)``, int64, CPU. Token id, document number, offset in the document.
        counts: ``(rows,)``, int64, CPU. Only the first ``counts[b]`` of row b's ``n`` are real.
    """

    keys: Tensor
    values: Tensor
    chunk_keys: Tensor
    sources: Tensor
    counts: Tensor


class ChunkRing:
    """Whole chunks of several rows and memory layers, the oldest overwritten first.

    Args:
        shape: memory layers, rows, key/value heads, tokens per chunk, head_dim.
        slots: chunks per row that fit before the oldest is overwritten.
        dtype: of the stored keys and values.
        device: where they lie. Sources lie on the CPU always.
        slots_now: how many of them to make room for at once; a few if None.

    Attributes:
        keys: ``(layers, rows, H_kv, slots, C, D)``. Grows by doubling up to ``slots``.
        values: likewise.
        chunk_keys: ``(layers, rows, H_kv, slots, D)``, float32.
        sources: ``(rows, slots, C, 3)``, int64, CPU.
        base: ``(rows,)``, int64, CPU. Chunks ever written before the row's last clear.
        written: ``(rows,)``, int64, CPU. Chunks written since.
        first: ``(rows,)``, int64, CPU. Chunks before this number are gone: they were no longer
            kept by the bank that was loaded.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        slots_now: int | None = None,
    ) -> None:
        layers, rows, heads, chunk_size, head_dim = shape
        self.max_slots = slots
        now = min(slots, _FIRST_SLOTS if slots_now is None else slots_now)
        self.keys = torch.zeros(
            layers, rows, heads, now, chunk_size, head_dim, dtype=dtype, device=device
        )
        self.values = torch.zeros_like(self.keys)
        self.chunk_keys = torch.zeros(layers, rows, heads, now, head_dim, device=device)
        self.sources = torch.full((rows, now, chunk_size, 3), -1)
        self.base = torch.zeros(rows, dtype=torch.int64)
        self.written = torch.zeros(rows, dtype=torch.int64)
        self.first = torch.zeros(rows, dtype=torch.int64)

    @property
    def slots(self) -> int:
        """Chunks per row for which there is room now."""
        return self.keys.shape[3]

    def append(self, chunks: Chunks) -> None:
        """Write each row's next chunks."""
        self.make_room(int((self.base + self.written + chunks.counts).max()))
        numbers = torch.arange(chunks.keys.shape[3])
        row, chunk = torch.nonzero(numbers < chunks.counts.unsqueeze(1), as_tuple=True)
        slot = (self.base[row] + self.written[row] + chunk) % self.slots
        self.sources[row, slot] = chunks.sources[row, chunk]
        device = self.keys.device
        row, chunk, slot = (index.to(device) for index in (row, chunk, slot))
        for held, given in (
            (self.keys, chunks.keys),
            (self.values, chunks.values),
            (self.chunk_keys, chunks.chunk_keys),
        ):
            # Index arrays apart from each other put their axis first on both sides alike.
            held[:, row, :, slot] = given.to(device, held.dtype)[:, row, :, chunk]
        self.written += chunks.counts

    def clear(self, rows: Tensor) -> None:
        """Start these rows' numbering again at 0; their chunks stay until they are overwritten."""
        self.base[rows] += self.written[rows]
        self.written[rows] = 0
        self.first[rows] = 0

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

    def read(self, start: Tensor, stop: Tensor) -> Chunks:
        """Copy a range of chunk numbers of every row.

        Args:
            start: ``(rows,)``, int64, CPU. First chunk of each row, still in the ring.
            stop: ``(rows,)``, int64, CPU. One past the last.

        Returns:
            The chunks; what fills up a row that has fewer than others is zero.
        """
        counts = stop - start
        numbers = torch.arange(int(counts.max()))
        real = numbers < counts.unsqueeze(1)
        slot = (self.base.unsqueeze(1) + start.unsqueeze(1) + numbers) % self.slots

        alike = bool(real.all()) and bool((slot == slot[0]).all())

        def pick(plane: Tensor) -> Tensor:
            """Give ``(layers, rows, H_kv, n, ...)`` of a plane that has slots instead of n."""
            index, missing = slot.to(plane.device), (~real).to(plane.device)
            if alike:
                return plane.index_select(3, index[0])
            picked = torch.stack(
                [plane[:, row].index_select(2, index[row]) for row in range(len(counts))], dim=1
            )
            missing = missing.view(1, len(counts), 1, -1, *(1,) * (plane.dim() - 4))
            return picked.masked_fill_(missing, 0)

        rows = torch.arange(len(counts)).unsqueeze(1)
        return Chunks(
            keys=pick(self.keys),
            values=pick(self.values),
            chunk_keys=pick(self.chunk_keys),
            sources=self.sources[rows, slot].masked_fill_(~real[:, :, None, None], -1),
            counts=counts,
        )

    def can_adopt(self, chunks: Chunks) -> bool:
        """Say whether `adopt` can take these chunks' storage for its own."""
        same_device = chunks.keys.device == self.keys.device
        return same_device and 0 < chunks.keys.shape[3] <= self.max_slots

    def adopt(self, chunks: Chunks, *, first: Tensor, written: Tensor) -> None:
        """Hold exactly these chunks, in the very storage that they have: nothing is copied.

        Args:
            chunks: each row's newest, maybe mapped from a file.
            first: ``(rows,)``, int64, CPU. The number of each row's first chunk in them.
            written: ``(rows,)``, int64, CPU. Chunks written to each row.
        """
        self.keys, self.values = chunks.keys, chunks.values
        self.chunk_keys, self.sources = chunks.chunk_keys, chunks.sources
        # Chunk `first` lies in slot 0.
        self.base, self.written = -first, written

    def place(self, row: int, number: int, chunks: Chunks, *, skip: int) -> None:
        """Copy one row of chunks to where they belong; no slot of a ring may be used twice yet.

        Args:
            row: which.
            number: of the first chunk that is copied.
            chunks: where from.
            skip: how many of that row's chunks stand before that one.
        """
        count = int(chunks.counts[row]) - skip
        if count <= 0:
            return
        slot = int(self.base[row]) + number
        for mine, given in (
            (self.keys, chunks.keys),
            (self.values, chunks.values),
            (self.chunk_keys, chunks.chunk_keys),
        ):
            mine[:, row, :, slot : slot + count] = given[:, row, :, skip : skip + count]
        self.sources[row, slot : slot + count] = chunks.sources[row, skip : skip + count]

    def sources_of(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Give where chunks came from.

        Args:
            rows: int64, CPU, of the shape of ``ids`` or one that is expanded to it.
            ids: int64, CPU, chunk numbers, each still in the ring.

        Returns:
            ``(*ids.shape, C, 3)``, int64, CPU.
        """
        return self.sources[rows, (self.base[rows] + ids) % self.slots]

    def make_room(self, needed: int) -> None:
        """Make sure that there are so many slots, or as many as there may be."""
        if needed <= self.slots or self.slots == self.max_slots:
            return
        # Below max_slots nothing has wrapped yet, so growing keeps every slot's number.
        slots = min(self.max_slots, max(needed, 2 * self.slots))
        self.keys, self.values, self.chunk_keys = (
            _longer(held, 3, slots) for held in (self.keys, self.values, self.chunk_keys)
        )
        self.sources = _longer(self.sources, 1, slots)


def _longer(held: Tensor, dim: int, slots: int) -> Tensor:
    shape = list(held.shape)
    shape[dim] = slots
    grown = held.new_zeros(shape)
    grown.narrow(dim, 0, held.shape[dim]).copy_(held)
    return grown
