"""The vectors behind a backend: one ring of keys per lane, numbered as they come.

    slot      0 1 2 3 4 5 6 7 | 8 9 ..    size 8: slots in use; the allocation goes on behind them
    id        8 9 . . 4 5 6 7             start 4, count 6, first_id 4

A vector never moves when others are added to or dropped from a full lane. Only growth copies: of
the allocation, which doubles, and of a lane that must grow while its vectors wrap around, whose
size then grows by half. Both are O(1) amortised per vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64
"""Slots come in multiples of this, so that a search can look at whole groups."""


@dataclass(frozen=True)
class Occupancy:
    """Which slots hold vectors, ready for a search.

    Attributes:
        n_slots: slots to look at in every lane, a multiple of `GROUP`.
        free: ``(lanes, free_stop - free_start)``, bool. Which of the slots from ``free_start`` to
            ``free_stop`` hold no vector; outside that range every slot of every lane does.
        free_start: first slot that is free in any lane.
        free_stop: one past the last such slot.
        starts: ``(lanes,)``, int64. Slot of the oldest vector.
        sizes: ``(lanes,)``, int64. Slots of the ring, at least 1.
        first_ids: ``(lanes,)``, int64. Id of the oldest vector.
        counts: ``(lanes,)``, int64. Vectors in each lane.
    """

    n_slots: int
    free: Tensor
    free_start: int
    free_stop: int
    starts: Tensor
    sizes: Tensor
    first_ids: Tensor
    counts: Tensor

    def ids(self, slots: Tensor) -> Tensor:
        """Give the insertion numbers of slots ``(lanes, q, k)``."""
        starts, sizes, first_ids = (
            values[:, None, None] for values in (self.starts, self.sizes, self.first_ids)
        )
        return first_ids + (slots - starts) % sizes

    def slots(self, ids: Tensor) -> Tensor:
        """Give the slots of insertion numbers ``(lanes, q, k)`` that the buffer holds."""
        starts, sizes, first_ids = (
            values[:, None, None] for values in (self.starts, self.sizes, self.first_ids)
        )
        return (starts + ids - first_ids) % sizes

    def holds(self, ids: Tensor) -> Tensor:
        """Say which insertion numbers ``(lanes, q, k)`` are those of stored vectors: bool."""
        ages = ids - self.first_ids[:, None, None]
        return (ages >= 0) & (ages < self.counts[:, None, None])


class KeyBuffer:
    """Rings of vectors, all lanes in one tensor.

    Attributes:
        keys: ``(lanes, capacity, dim)``, float32 or what else was asked for. Free slots hold
            anything, NaN included.
        counts: ``(lanes,)``, int64, on the CPU. Vectors in each lane.
        first_ids: ``(lanes,)``, int64, on the CPU. Id of each lane's oldest vector.
    """

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.keys = _allocate(lanes, 0, dim, device, dtype)
        self.counts, self.first_ids, self._starts, self._sizes = (
            _allocate_zeros(lanes) for _ in range(4)
        )
        self._occupancy: Occupancy | None = None

    def append(self, keys: Tensor, lanes: Tensor) -> None:
        """Append ``(len(lanes), n, dim)`` to the given lanes, ``(len(lanes),)`` int64."""
        n = keys.shape[1]
        if not keys.numel():
            return
        self._make_room(lanes, self.counts[lanes] + n)
        ends = self._starts[lanes] + self.counts[lanes]
        slots = (ends[:, None] + torch.arange(n)) % self._sizes[lanes][:, None]
        device = self.keys.device
        self.keys[lanes[:, None].to(device), slots.to(device)] = keys.to(self.keys.dtype)
        self.counts[lanes] += n
        self._occupancy = None

    def drop_oldest(self, n: int, lanes: Tensor) -> None:
        """Forget the ``n`` oldest vectors of the given lanes, which hold at least as many."""
        self.counts[lanes] -= n
        self.first_ids[lanes] += n
        self._starts[lanes] = (self._starts[lanes] + n) % self._sizes[lanes].clamp(min=1)
        self._free_empty_lanes()

    def clear(self, lanes: Tensor) -> None:
        """Forget all vectors of the given lanes and number from 0 again."""
        self.counts[lanes] = 0
        self.first_ids[lanes] = 0
        self._free_empty_lanes()

    def live(self, lanes: Tensor) -> Tensor:
        """Copy the vectors of the given lanes, oldest first, one lane after the other.

        Returns:
            ``(counts[lanes].sum(), dim)``, float32.
        """
        counts = self.counts[lanes]
        rows, positions = _rows_and_positions(counts)
        slots = (self._starts[lanes][rows] + positions) % self._sizes[lanes][rows]
        device = self.keys.device
        return self.keys[lanes[rows].to(device), slots.to(device)].float()

    def at(self, lane: int, ids: Tensor) -> Tensor:
        """Copy the vectors of ids ``(n,)`` that one lane holds: ``(n, dim)``, float32."""
        ages = ids - self.first_ids[lane]
        slots = (self._starts[lane] + ages) % self._sizes[lane].clamp(min=1)
        return self.keys[lane, slots.to(self.keys.device)].float()

    def between(self, lane: int, start: int, stop: int) -> Tensor:
        """Copy the vectors of ids ``[start, stop)``, which one lane holds: ``(n, dim)``."""
        return self.at(lane, torch.arange(start, stop))

    def replace(self, keys: Tensor, counts: Tensor, first_ids: Tensor) -> None:
        """Hold exactly these vectors, in the order that `live` gives for all lanes."""
        lanes, _, dim = self.keys.shape
        capacity = whole_groups(int(counts.max()))
        device = self.keys.device
        self.keys = _allocate(lanes, capacity, dim, device, self.keys.dtype)
        rows, positions = _rows_and_positions(counts)
        self.keys[rows.to(device), positions.to(device)] = keys.to(device, self.keys.dtype)
        self.counts.copy_(counts)
        self._sizes.copy_(counts)
        self.first_ids.copy_(first_ids)
        self._starts.zero_()
        self._occupancy = None

    def pieces(self, lane: int) -> list[tuple[int, int]]:
        """Give the runs of slots ``[start, stop)`` that hold one lane's vectors: none, 1 or 2."""
        start, count, size = (
            int(values[lane]) for values in (self._starts, self.counts, self._sizes)
        )
        if count == size:
            return [(0, size)] if size else []
        wrapped = max(start + count - size, 0)
        return [
            (begin, end)
            for begin, end in ((start, start + count - wrapped), (0, wrapped))
            if begin < end
        ]

    def occupancy(self) -> Occupancy:
        """Say which slots hold vectors; computed once after each change."""
        if self._occupancy is None:
            self._occupancy = self._look()
        return self._occupancy

    def _look(self) -> Occupancy:
        n_slots = whole_groups(int(self._sizes.max()))
        begins, ends = self._free_runs(n_slots)
        some = begins < ends
        # No further than needed: to look at every slot would cost as much as one query does.
        start = int(begins[some].min()) if some.any() else 0
        stop = int(ends[some].max()) if some.any() else 0
        slots = torch.arange(start, stop)
        free = ((slots >= begins[..., None]) & (slots < ends[..., None])).any(0)
        device = self.keys.device
        return Occupancy(
            n_slots=n_slots,
            free=free.to(device),
            free_start=start,
            free_stop=stop,
            starts=self._starts.to(device, copy=True),
            sizes=self._sizes.clamp(min=1).to(device),
            first_ids=self.first_ids.to(device, copy=True),
            counts=self.counts.to(device, copy=True),
        )

    def _free_runs(self, n_slots: int) -> tuple[Tensor, Tensor]:
        """Give where the two runs of free slots of each lane begin and end, ``(2, lanes)`` each."""
        ends = self._starts + self.counts
        wrapped = ends > self._sizes
        return (
            torch.stack([torch.where(wrapped, ends - self._sizes, 0), ends.minimum(self._sizes)]),
            torch.stack([self._starts, torch.full_like(ends, n_slots)]),
        )

    def _make_room(self, lanes: Tensor, needed: Tensor) -> None:
        sizes = self._sizes[lanes]
        wrapped = self._starts[lanes] + self.counts[lanes] > sizes
        # A lane that does not wrap grows for nothing, so exactly as far as needed: no slot of a
        # lane that was only ever filled is free. One that wraps is copied, so it grows by half.
        grown = torch.where(wrapped, torch.maximum(needed, sizes + sizes // 2), needed)
        short = needed > sizes
        self._reserve(int(torch.where(short, grown, sizes).max()))
        self._unroll(lanes[short & wrapped])
        self._sizes[lanes] = torch.where(short, grown, sizes)

    def _reserve(self, size: int) -> None:
        lanes, capacity, dim = self.keys.shape
        if size <= capacity:
            return
        room = whole_groups(max(size, 2 * capacity))
        larger = _allocate(lanes, room, dim, self.keys.device, self.keys.dtype)
        used = int(self._sizes.max())
        larger[:, :used] = self.keys[:, :used]
        self.keys = larger

    def _unroll(self, lanes: Tensor) -> None:
        # One lane at a time: a copy of all of them at once would double the memory in use.
        for lane in lanes.tolist():
            keys = self.live(torch.tensor([lane]))
            self.keys[lane, : len(keys)] = keys.to(self.keys.dtype)
            self._starts[lane] = 0

    def _free_empty_lanes(self) -> None:
        empty = self.counts == 0
        self._starts[empty] = 0
        self._sizes[empty] = 0
        self._occupancy = None


def _allocate(
    lanes: int, capacity: int, dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    # Tensors made in inference mode could never be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(lanes, capacity, dim, dtype=dtype, device=device)


def _allocate_zeros(lanes: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(lanes, dtype=torch.int64)


def whole_groups(size: int) -> int:
    """Round up to a multiple of `GROUP`."""
    return -(-size // GROUP) * GROUP


def _rows_and_positions(counts: Tensor) -> tuple[Tensor, Tensor]:
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    starts = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows)) - starts[rows]
