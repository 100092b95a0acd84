"""The memory bank: keys and values of past tokens, and the index that finds them.

    write:    (B, H_kv, T, D) ─ tail of the row ─► whole chunks ─► ring (keys, values)
                                                └─► mean of the chunk's keys ─► index
    retrieve: (B, H, T, D) ─► search, K/C chunks a query ─► places in the ring

Rows never see each other: each row and key/value head is a lane of its own in the index. The query
heads of a group (grouped-query attention) search the lane of their key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer.errors import ShapeError
from memlayer.memory import persistence
from memlayer.memory.retrieved import Retrieved
from memlayer.memory.ring import ChunkRing

if TYPE_CHECKING:
    from memlayer.retrieval import RetrievalBackend

MakeIndex = Callable[[int], "RetrievalBackend"]


class MemoryBank:
    """A FIFO memory per row, in chunks, searchable by inner product.

    The number of rows is that of the first batch written; after `clear()` another may follow. A
    chunk that is not whole yet waits in a tail and cannot be retrieved; padding is never stored.

    Args:
        capacity: tokens per row that can be retrieved, a multiple of ``chunk_size``.
        chunk_size: C, tokens behind one index entry.
        top_k: K, tokens that `retrieve` finds per query, a multiple of ``chunk_size``.
        num_layers: memory layers, each with its own index.
        num_key_value_heads: H_kv.
        head_dim: D.
        make_index: gives an empty backend for a number of lanes.
        dtype: of the stored keys and values. Chunk keys are means in float32 of the keys as they
            came, before rounding to this.
        device: where everything lies.
        shared: one memory for all rows of a batch, instead of one each.
        slack: tokens beyond ``capacity`` that stay readable for a backward pass.
        identity: what these keys and values are of (model, layers); a saved bank of another
            identity is refused.
    """

    def __init__(
        self,
        *,
        capacity: int,
        chunk_size: int,
        top_k: int,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        make_index: MakeIndex,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shared: bool = False,
        slack: int = 1024,
        identity: str = "",
    ) -> None:
        self.capacity = capacity
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.num_layers = num_layers
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self.shared = shared
        self.identity = identity
        self._make_index = make_index
        self._tail_keys: Tensor
        self._tail_values: Tensor
        self._slack_chunks = -(-slack // chunk_size) + 1
        self._forget_everything()

    def __len__(self) -> int:
        """Count the tokens of the fullest row, at most `capacity`."""
        return int(self.lengths.max()) if self.rows else 0

    def __repr__(self) -> str:
        return (
            f"MemoryBank(rows={self.rows}, length={len(self)}, capacity={self.capacity}, "
            f"chunk_size={self.chunk_size}, layers={self.num_layers})"
        )

    @property
    def rows(self) -> int:
        """Memories held, one per row of the batch (one in all if shared); 0 before any write."""
        return 0 if self._ring is None else self._ring.written.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens held by each row, waiting ones included: ``(rows,)``, int64, on the CPU."""
        if self._ring is None:
            return torch.zeros(0, dtype=torch.int64)
        written = self._ring.written * self.chunk_size + self._tail_lengths
        return written.clamp(max=self.capacity)

    @property
    def is_readable(self) -> bool:
        """Whether any row holds a whole chunk."""
        return self._ring is not None and bool(self._ring.written.any())

    # ---------------------------------------------------------------- writing

    # Storage made in inference mode could never be written to outside of it.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def write(
        self,
        keys: Tensor | Sequence[Tensor],
        values: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> None:
        """Append tokens to each row's memory, dropping the oldest chunks of a full one.

        Args:
            keys: ``(B, H_kv, T, D)``, one tensor per memory layer (a single one may stand alone).
            values: likewise.
            mask: ``(B, T)``, bool or integer; tokens where it is 0 are padding and not stored.

        Raises:
            ShapeError: if a shape, a device or the number of rows is wrong, or a key or value is
                NaN or infinite; nothing is stored then.
        """
        new_keys, new_values = self._stack("keys", keys), self._stack("values", values)
        if new_keys.shape != new_values.shape:
            raise ShapeError(
                f"keys and values must have the same shape, got {tuple(new_keys.shape[1:])} and "
                f"{tuple(new_values.shape[1:])}"
            )
        mask = self._check_mask(mask, new_keys)
        if self.shared:
            new_keys, new_values = _join_rows(new_keys), _join_rows(new_values)
            mask = None if mask is None else mask.reshape(1, -1)
        self._check_rows(new_keys.shape[1])
        if self._ring is None:
            self._allocate(new_keys.shape[1])
        # A piece may not lap the ring: its chunks must all have slots of their own.
        piece = self._slack_chunks * self.chunk_size
        for start in range(0, new_keys.shape[3], piece):
            part = slice(start, start + piece)
            self._append(
                new_keys[:, :, :, part],
                new_values[:, :, :, part],
                None if mask is None else mask[:, part],
            )

    def _append(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        ring = self._held_ring()
        order, lengths = self._packing(keys.shape[3], mask)
        packed_keys = _pack(self._tail_keys, keys, order)
        packed_values = _pack(self._tail_values, values, order)
        whole = lengths // self.chunk_size
        self._keep_tail(packed_keys, packed_values, whole, lengths)
        most = int(whole.max())
        if most == 0:
            return
        chunk_keys, chunk_values = (
            packed[:, :, :, : most * self.chunk_size].unflatten(3, (most, self.chunk_size))
            for packed in (packed_keys, packed_values)
        )
        self._index_chunks(chunk_keys.float().mean(dim=-2), whole)
        ring.append(chunk_keys, chunk_values, whole)

    def _packing(self, tokens: int, mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Say how a row's waiting and new tokens become one sequence without gaps.

        Returns:
            The order ``(rows, C - 1 + tokens)`` in which to take them, or None if all tails are
            empty and nothing is padding; and how many there are in each row, ``(rows,)``.
        """
        waiting = self._tail_lengths
        if mask is None and not waiting.any():
            return None, torch.full_like(waiting, tokens)
        in_tail = torch.arange(self.chunk_size - 1) < waiting.unsqueeze(1)
        if mask is None:
            mask = torch.ones(self.rows, tokens, dtype=torch.bool)
        real = torch.cat([in_tail, mask.cpu()], dim=1)
        order = torch.argsort(~real, dim=1, stable=True)
        return order.to(self.device), real.sum(dim=1)

    def _keep_tail(self, keys: Tensor, values: Tensor, whole: Tensor, lengths: Tensor) -> None:
        start = (whole * self.chunk_size).unsqueeze(1) + torch.arange(self.chunk_size - 1)
        start = start.clamp(max=keys.shape[3] - 1).to(self.device)
        precision = self._tail_keys.dtype
        self._tail_keys = _take(keys, start).to(precision)
        self._tail_values = _take(values, start).to(precision)
        self._tail_lengths = lengths - whole * self.chunk_size

    def _index_chunks(self, chunk_keys: Tensor, counts: Tensor) -> None:
        """Add ``(layers, rows, H_kv, n, D)`` chunk keys, dropping what no longer has room."""
        written = self._held_ring().written
        held = written.clamp(max=self._capacity_chunks)
        overflow = (held + counts - self._capacity_chunks).clamp(min=0)
        # Rows that take and drop alike go together: one call in all, unless padding differs.
        for count, dropped in sorted(set(zip(counts.tolist(), overflow.tolist(), strict=True))):
            if count == 0:
                continue
            rows = torch.nonzero((counts == count) & (overflow == dropped)).flatten()
            lanes = self._lanes(rows)
            # More new chunks than the index holds: the first of them are never searchable, but
            # keep their numbers.
            held_before = min(dropped, int(held[rows[0]]))
            for index, keys in zip(self._indexes, chunk_keys, strict=True):
                if held_before:
                    index.remove_oldest(held_before, lanes)
                index.add(keys[rows.to(keys.device), :, :count].flatten(0, 1), lanes)
                if dropped > held_before:
                    index.remove_oldest(dropped - held_before, lanes)

    # ---------------------------------------------------------------- reading

    @torch.no_grad()
    def retrieve(
        self, queries: Tensor, *, layer: int = 0, top_k: int | None = None, expand: int = 1
    ) -> Retrieved:
        """Find the chunks whose mean key has the largest inner product with each query.

        Args:
            queries: ``(B, H, T, D)``, not rotated, not scaled. H is a multiple of H_kv.
            layer: which memory layer, counted from 0.
            top_k: tokens per query; the bank's own if None. Multiple of ``chunk_size``.
            expand: consecutive batch rows that read one row of memory (beams, several returned
                sequences). A shared bank ignores it.

        Raises:
            ShapeError: if the queries do not fit the bank.
        """
        batch, heads, tokens, head_dim = queries.shape
        expand = batch if self.shared else expand
        ring = self._held_ring()
        self._check_queries(queries, expand)
        chunks = (self.top_k if top_k is None else top_k) // self.chunk_size
        group = heads // self.num_key_value_heads
        # (B, H, T, D) -> (lanes, expand * group * T, D)
        split = (self.rows, expand, self.num_key_value_heads, group, tokens)
        lanes = queries.reshape(*split, head_dim).transpose(1, 2).flatten(2, 4).flatten(0, 1)
        result = self._indexes[layer].search(lanes, chunks)

        def as_queries(found: Tensor) -> Tensor:
            apart = found.reshape(self.rows, self.num_key_value_heads, expand, group, tokens, -1)
            return apart.transpose(1, 2).reshape(batch, heads, tokens, -1)

        held = result.ids.unflatten(0, (self.rows, self.num_key_value_heads))
        places = ring.locate(held.clamp(min=0))
        return Retrieved(
            ids=as_queries(result.ids),
            scores=as_queries(result.scores),
            found=as_queries(result.ids >= 0),
            places=as_queries(places),
            keys=(ring.keys[layer].flatten(0, 2),),
            values=(ring.values[layer].flatten(0, 2),),
            intact=self._watch(ring),
        )

    def _watch(self, ring: ChunkRing) -> Callable[[], bool]:
        """Remember which chunks can be read now; the result says if none was overwritten since."""
        oldest = ring.base + (ring.written - self._capacity_chunks).clamp(min=0)
        keys = ring.keys

        def intact() -> bool:
            # A ring that grew left its old storage as it was.
            moved = self._ring is not ring or ring.keys is not keys
            return moved or bool((ring.base + ring.written - ring.slots <= oldest).all())

        return intact

    # ---------------------------------------------------------------- forgetting, keeping

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget what these rows hold; None: all of them, and how many there were.

        Raises:
            ShapeError: if there is no such row.
        """
        if rows is None:
            self._forget_everything()
            return
        if not all(0 <= row < self.rows for row in rows):
            raise ShapeError(f"rows must be within 0 to {self.rows - 1}, got {list(rows)}")
        if not rows:
            return
        chosen = torch.tensor(sorted(set(rows)))
        self._held_ring().clear(chosen)
        self._tail_lengths[chosen] = 0
        for index in self._indexes:
            index.clear(self._lanes(chosen))

    def save(self, directory: str | Path) -> None:
        """Write the bank into a directory, as a whole or not at all.

        Source: docs/design.md, "A bank on disk".
        """
        persistence.save(self, Path(directory))

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Replace the contents by what `save` wrote; answers are the same as before.

        Raises:
            MemoryFormatError: if the files are missing or damaged, or are of another model, memory
                layer, chunk size, capacity or dtype; the bank is left as it was then.
        """
        persistence.load(self, Path(directory))

    # ---------------------------------------------------------------- parts

    @property
    def _capacity_chunks(self) -> int:
        return self.capacity // self.chunk_size

    def _held_ring(self) -> ChunkRing:
        if self._ring is None:
            raise ShapeError("the memory is empty: write to it before reading")
        return self._ring

    def _forget_everything(self) -> None:
        self._ring: ChunkRing | None = None
        self._indexes: list[RetrievalBackend] = []
        empty = torch.zeros(0, device=self.device)
        self._tail_keys, self._tail_values = empty, empty
        self._tail_lengths = torch.zeros(0, dtype=torch.int64)

    def _allocate(self, rows: int) -> None:
        heads = self.num_key_value_heads
        self._indexes = [self._make_index(rows * heads) for _ in range(self.num_layers)]
        self._ring = ChunkRing(
            (self.num_layers, rows, heads, self.chunk_size, self.head_dim),
            slots=self._capacity_chunks + self._slack_chunks + 1,
            dtype=self.dtype,
            device=self.device,
        )
        # Waiting tokens keep the precision that they came in, for the mean of their chunk.
        tail = (self.num_layers, rows, heads, self.chunk_size - 1, self.head_dim)
        precision = torch.promote_types(self.dtype, torch.float32)
        self._tail_keys = torch.zeros(tail, dtype=precision, device=self.device)
        self._tail_values = torch.zeros_like(self._tail_keys)
        self._tail_lengths = torch.zeros(rows, dtype=torch.int64)

    def _lanes(self, rows: Tensor) -> list[int]:
        heads = torch.arange(self.num_key_value_heads)
        lanes: list[int] = (rows.unsqueeze(1) * self.num_key_value_heads + heads).flatten().tolist()
        return lanes

    def _stack(self, name: str, tensors: Tensor | Sequence[Tensor]) -> Tensor:
        layers = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if len(layers) != self.num_layers:
            raise ShapeError(
                f"{name} must be one tensor per memory layer ({self.num_layers}), got {len(layers)}"
            )
        for tensor in layers:
            fits = (
                tensor.dim() == 4
                and tensor.shape == layers[0].shape
                and tensor.shape[1] == self.num_key_value_heads
                and tensor.shape[3] == self.head_dim
            )
            if not fits:
                raise ShapeError(
                    f"{name} must have shape (B, H_kv={self.num_key_value_heads}, T, "
                    f"D={self.head_dim}), got {tuple(tensor.shape)}"
                )
            if tensor.device != self.device:
                raise ShapeError(f"{name} must be on {self.device}, got {tensor.device}")
            if not tensor.is_floating_point():
                raise ShapeError(f"{name} must be floating point, got {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ShapeError(f"{name} must be finite, got NaN or infinity; nothing was stored")
        return torch.stack([tensor.detach() for tensor in layers])

    def _check_mask(self, mask: Tensor | None, keys: Tensor) -> Tensor | None:
        if mask is None:
            return None
        expected = (keys.shape[1], keys.shape[3])
        if mask.shape != expected:
            raise ShapeError(f"mask must have shape (B, T)={expected}, got {tuple(mask.shape)}")
        mask = mask.bool()
        return None if mask.all() else mask

    def _check_rows(self, rows: int) -> None:
        if self.rows and rows != self.rows:
            raise ShapeError(
                f"the memory holds {self.rows} rows, got a batch of {rows}; call memory.clear() "
                "to start again with another batch size"
            )

    def _check_queries(self, queries: Tensor, expand: int) -> None:
        batch, heads, _, head_dim = queries.shape
        if batch != self.rows * expand:
            raise ShapeError(
                f"the memory holds {self.rows} rows, got a batch of {batch}; use the batch that "
                "was memorized, or call memory.clear() first"
            )
        if heads % self.num_key_value_heads or head_dim != self.head_dim:
            raise ShapeError(
                f"queries must have a multiple of {self.num_key_value_heads} heads of "
                f"{self.head_dim}, got {heads} heads of {head_dim}"
            )


def _join_rows(tensors: Tensor) -> Tensor:
    """Join all rows' tokens: ``(layers, B, H, T, D) -> (layers, 1, H, B * T, D)``."""
    return tensors.transpose(1, 2).flatten(2, 3).unsqueeze(1)


def _pack(tail: Tensor, new: Tensor, order: Tensor | None) -> Tensor:
    """Join waiting and new tokens of every row, real ones first."""
    if order is None:
        return new
    return _take(torch.cat([tail, new.to(tail.dtype)], dim=3), order)


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """Pick tokens: ``(layers, rows, H, T, D)`` by ``(rows, n)`` -> ``(layers, rows, H, n, D)``."""
    layers, rows, heads, _, dim = tokens.shape
    index = order.view(1, rows, 1, -1, 1).expand(layers, rows, heads, order.shape[1], dim)
    return torch.gather(tokens, 3, index)
