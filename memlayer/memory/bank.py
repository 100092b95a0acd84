"""The memory bank: keys and values of past tokens, and the index that finds them.

    write:    (B, H_kv, T, D) ─ waiting tokens ─► whole chunks ─► ring (keys, values, sources)
                                               └─► mean of the chunk's keys ─► index
    retrieve: (B, H, T, D) ─► search, K/C chunks a query ─► places in the ring

Rows never see each other: each row and key/value head is a lane of its own in the index. The query
heads of a group (grouped-query attention) search the lane of their key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from memlayer.config import MemoryStorage
from memlayer.errors import ConfigError, ShapeError
from memlayer.memory import checks, persistence
from memlayer.memory.documents import DocumentRecord, Documents
from memlayer.memory.offload import bring
from memlayer.memory.reading import Reading, ended, forgotten
from memlayer.memory.retrieved import Retrieved
from memlayer.memory.ring import ChunkRing, Chunks
from memlayer.memory.waiting import NewTokens, WaitingTokens

if TYPE_CHECKING:
    from memlayer.retrieval import RetrievalBackend

MakeIndex = Callable[[int], "RetrievalBackend"]


class MemoryBank:
    """A FIFO memory per row, in chunks, searchable by inner product.

    The number of rows is that of the first batch written; after `clear()` another may follow. A
    token whose chunk is not whole yet waits and cannot be retrieved; padding is never stored.
    Beside each token stands where it came from, which `look_up` gives back.

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
        device: where queries, new keys and values come from, and the index lies.
        storage: ``"device"``: keys and values of whole chunks lie there, too. ``"host"``: in main
            memory, or in the file that they are loaded from; `retrieve` copies what it found.
        shared: one memory for all rows of a batch, instead of one each.
        slack: tokens beyond ``capacity`` that stay readable for a backward pass.
        overlap: O, newest tokens of each row that wait and cannot be retrieved, since the window
            that reads the memory contains them, too. 0: windows that share nothing.
        identity: what these keys and values are of (model, layers); a saved bank of another
            identity is refused.

    Attributes:
        reading: where the reading of each batch row's text stands; `LongMemModel.memorize` goes on
            from there.
        tokenizer: a fingerprint of the tokenizer behind the token ids, if whoever memorizes says
            so; saved and loaded, and forgotten with everything else.
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
        storage: MemoryStorage = "device",
        shared: bool = False,
        slack: int = 1024,
        overlap: int = 0,
        identity: str = "",
    ) -> None:
        self.capacity = capacity
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.num_layers = num_layers
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.dtype = dtype
        # With its number: tensors on "cuda" say that they are on "cuda:0".
        self.device = torch.empty(0, device=device).device
        if storage not in get_args(MemoryStorage):
            raise ConfigError(
                f"storage must be one of {', '.join(get_args(MemoryStorage))}, got {storage!r:.80}"
            )
        self.storage = storage
        if overlap < 0:
            raise ConfigError(f"overlap must be at least 0, got {overlap}")
        if overlap and shared:
            raise ConfigError(
                f"overlap={overlap} needs a memory for each row, got one that all rows share; "
                "leave windows without overlap, or give rows memories of their own"
            )
        self.shared = shared
        self.overlap = overlap
        self.identity = identity
        self.tokenizer: str | None
        self.reading: Reading
        self._saved_as: str | None
        self._make_index = make_index
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
        """Tokens held by each row: ``(rows,)``, int64, on the CPU.

        Those that wait for their chunk are counted, those that a window still contains are not.
        """
        if self._ring is None:
            return torch.zeros(0, dtype=torch.int64)
        held = self._held_chunks() * self.chunk_size + self._held_waiting().lengths_for_chunks()
        return held.clamp(max=self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and chunk keys, room made for coming ones included.

        What the backend's index takes is its own affair and not in it.
        """
        ring = self._ring
        held = () if ring is None else (ring.keys, ring.values, ring.chunk_keys)
        return sum(tensor.nbytes for tensor in held)

    @property
    def is_readable(self) -> bool:
        """Whether any row holds a whole chunk."""
        return self._ring is not None and bool(self._held_chunks().any())

    def chunk_numbers(self, row: int) -> range:
        """Give the numbers of the chunks that can be retrieved in a row, the oldest first."""
        if not self.rows:
            return range(0)
        written = int(self._held_ring().written[row])
        return range(written - int(self._held_chunks()[row]), written)

    def tokens_written(self, row: int) -> int:
        """Count the tokens that a row was ever given since its last clear, waiting ones too."""
        if not self.rows:
            return 0
        chunks = int(self._held_ring().written[row])
        return chunks * self.chunk_size + int(self._held_waiting().lengths[row])

    @property
    def documents(self) -> list[str]:
        """Names of the documents that were memorized; a document's number is its place here."""
        return self._documents.names

    @property
    def document_records(self) -> tuple[DocumentRecord, ...]:
        """What is known of each document, in the order of `documents`."""
        return self._documents.records

    def document_number(self, name: str) -> int:
        """Give a document's number; a new name is added.

        Raises:
            ConfigError: if the name is not text, or empty.
        """
        return self._documents.number(name)

    def find_document(self, name: str) -> DocumentRecord | None:
        """Give what is known of a document, or None if there is none of that name."""
        return self._documents.find(name)

    def note_document(self, name: str, *, sha256: str, complete: bool) -> None:
        """Record the checksum of a document's token ids, and whether all of it is memorized."""
        self._documents.update(name, sha256=sha256, complete=complete)

    # ---------------------------------------------------------------- writing

    # Storage made in inference mode could never be written to outside of it.
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def write(
        self,
        keys: Tensor | Sequence[Tensor],
        values: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        sources: Tensor | None = None,
        *,
        reading: Reading | None = None,
    ) -> None:
        """Append tokens to each row's memory, dropping the oldest chunks of a full one.

        Args:
            keys: ``(B, H_kv, T, D)``, one tensor per memory layer (a single one may stand alone).
            values: likewise.
            mask: ``(B, T)``, bool or integer; tokens where it is 0 are padding and not stored.
            sources: ``(B, T, 3)``, int64. Token id, document number and offset in the document of
                each token, -1 for what is not known; all -1 if None.
            reading: where the reading of each row's text stands after this. None: the open segments
                of the rows that are written end, since these tokens did not go through them.

        Raises:
            ShapeError: if a shape, a device or the number of rows is wrong, or a key or value is
                NaN or infinite; nothing is stored then.
        """
        new_keys = checks.stack_layers(self, "keys", keys)
        new_values = checks.stack_layers(self, "values", values)
        checks.check_same_shape(new_keys, new_values)
        mask = checks.check_mask(mask, new_keys)
        sources = checks.check_sources(self, sources, new_keys, mask)
        rows = list(range(new_keys.shape[1]))
        if mask is not None and not self.shared:
            rows = mask.any(dim=1).nonzero().flatten().tolist()
        if self.shared:
            new_keys, new_values = _join_rows(new_keys), _join_rows(new_values)
            sources = sources.reshape(1, -1, 3)
            mask = None if mask is None else mask.reshape(1, -1)
        checks.check_rows(self, new_keys.shape[1])
        if self._ring is None:
            self._allocate(new_keys.shape[1])
        new = NewTokens(keys=new_keys, values=new_values, sources=sources, mask=mask)
        # A piece may not lap the ring: its chunks must all have slots of their own.
        piece = self._slack_chunks * self.chunk_size
        for start in range(0, new_keys.shape[3], piece):
            self._append(self._held_waiting().cut(new.part(slice(start, start + piece))))
        self.reading = ended(self.reading, rows) if reading is None else reading
        for place in reading or ():
            if place.document >= 0:
                self._documents.read_to(place.document, place.offset)

    def _append(self, chunks: Chunks) -> None:
        if chunks.counts.any():
            self._index_chunks(chunks.chunk_keys, chunks.counts)
            self._held_ring().append(chunks)

    def _index_chunks(self, chunk_keys: Tensor, counts: Tensor) -> None:
        """Add ``(layers, rows, H_kv, n, D)`` chunk keys, dropping what no longer has room."""
        held = self._held_chunks()
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
        checks.check_queries(self, queries, expand)
        chunks = (self.top_k if top_k is None else top_k) // self.chunk_size
        group = heads // self.num_key_value_heads
        # (B, H, T, D) -> (lanes, expand * group * T, D)
        split = (self.rows, expand, self.num_key_value_heads, group, tokens)
        lanes = queries.reshape(*split, head_dim).transpose(1, 2).flatten(2, 4).flatten(0, 1)
        result = self._indexes[layer].search(lanes, chunks)

        def as_queries(found: Tensor) -> Tensor:
            apart = found.reshape(self.rows, self.num_key_value_heads, expand, group, tokens, -1)
            return apart.transpose(1, 2).reshape(batch, heads, tokens, -1)

        ids = self._chunk_numbers(result.ids)
        numbers = as_queries(ids)
        written = ring.written.to(ids.device).repeat_interleave(batch // self.rows)
        held = ids.unflatten(0, (self.rows, self.num_key_value_heads))
        places = ring.locate(held.clamp(min=0))
        keys, values = ring.keys[layer].flatten(0, 2), ring.values[layer].flatten(0, 2)
        if self.storage == "host":
            (keys, values), places = bring((keys, values), places, self.device)
        return Retrieved(
            ids=numbers,
            scores=as_queries(result.scores),
            found=numbers >= 0,
            ages=written.view(-1, 1, 1, 1) - 1 - numbers,
            written=written,
            places=as_queries(places),
            keys=(keys,),
            values=(values,),
            intact=self._watch(ring) if self.storage == "device" else lambda: True,
        )

    def _watch(self, ring: ChunkRing) -> Callable[[], bool]:
        """Remember which chunks can be read now; the result says if none was overwritten since."""
        oldest = ring.base + ring.written - self._held_chunks()
        keys = ring.keys

        def intact() -> bool:
            # A ring that grew left its old storage as it was.
            moved = self._ring is not ring or ring.keys is not keys
            return moved or bool((ring.base + ring.written - ring.slots <= oldest).all())

        return intact

    def _chunk_numbers(self, ids: Tensor) -> Tensor:
        """Turn an index's insertion numbers ``(lanes, ...)`` into chunk numbers; -1 stays."""
        if not self._index_offsets.any():
            return ids
        offsets = self._index_offsets.repeat_interleave(self.num_key_value_heads).to(ids.device)
        return torch.where(ids < 0, ids, ids + offsets.view(-1, *(1,) * (ids.dim() - 1)))

    def look_up(self, retrieved: Retrieved | Tensor, *, expand: int = 1) -> Tensor:
        """Say where chunks came from; for inspection, of a few queries.

        Args:
            retrieved: what `retrieve` found, or chunk numbers ``(B, H, T, n)``, int64.
            expand: consecutive batch rows that read one row of memory. A shared bank ignores it.

        Returns:
            ``(B, H, T, n, C, 3)``, int64, on the CPU: token id, document number and offset in the
            document of each token of each chunk. -1 for what is not known, and wherever the chunk
            was not found or is no longer held.

        Raises:
            ShapeError: if the batch does not fit the bank.
        """
        ids = (retrieved.ids if isinstance(retrieved, Retrieved) else retrieved).cpu()
        if ids.dim() != 4:
            raise ShapeError(f"chunk numbers must have shape (B, H, T, n), got {tuple(ids.shape)}")
        ring, batch = self._held_ring(), ids.shape[0]
        expand = batch if self.shared else expand
        checks.check_batch(self, batch, expand)
        rows = (torch.arange(batch) // expand).view(-1, 1, 1, 1).expand_as(ids)
        held = ids >= (ring.written - self._held_chunks())[rows]
        held &= (ids < ring.written[rows]) & (ids >= 0)
        found = ring.sources_of(rows, ids.where(held, 0))
        return found.masked_fill(~held[..., None, None], -1)

    # ---------------------------------------------------------------- forgetting, keeping

    def clear(self, rows: Sequence[int] | None = None) -> None:
        """Forget what these rows hold; None: all of them, how many there were, and all documents.

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
        self._saved_as = None  # Chunk numbers begin again: saved ones mean others.
        self._held_waiting().clear(chosen)
        self._index_offsets[chosen] = 0
        self.reading = forgotten(self.reading, range(len(self.reading)) if self.shared else rows)
        for index in self._indexes:
            index.clear(self._lanes(chosen))

    def save(self, directory: str | Path, *, indexes: persistence.Indexes = "rebuild") -> None:
        """Write the bank into a directory, as a whole or not at all, by one writer at a time.

        Where the directory holds the state that this bank was last saved to or loaded from, only
        the chunks that are new since are written. Whatever else stands there is replaced. A kill at
        any moment leaves the old state or the new one; when this returns, the new one is on the
        disk.

        Args:
            directory: made if need be.
            indexes: ``"rebuild"``: `load` builds each index from the saved chunk keys. ``"save"``:
                the backend's own files are kept too, for backends that are slow to build.

        Raises:
            StorageError: if another process writes there, or the files cannot be written: the disk
                is full or read-only. The old state stands then.

        Source: docs/memory.md.
        """
        persistence.save(self, Path(directory), indexes=indexes)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def load(self, directory: str | Path, *, verify: bool = True) -> None:
        """Replace the contents by what `save` wrote; answers are the same as before.

        The files are mapped into memory. If the bank lies in one shard, and this one's storage in
        main memory (``storage="host"``, or on the CPU), the mapping is its storage: nothing is
        copied until something is written, so it may be larger than main memory. `capacity` is this
        bank's own: with less than was saved, the newest chunks are taken.

        Args:
            directory: where a bank was saved; it may be saved to meanwhile.
            verify: read all of it once, and compare checksums. Otherwise sizes and the form of all
                files are checked, and their contents believed.

        Raises:
            MemoryFormatError: if the files are missing or damaged, or are of another model, memory
                layer, chunk size or dtype; the bank is left as it was then.
        """
        persistence.load(self, Path(directory), verify=verify)

    # ---------------------------------------------------------------- parts

    @property
    def _capacity_chunks(self) -> int:
        return self.capacity // self.chunk_size

    def _held_ring(self) -> ChunkRing:
        if self._ring is None:
            raise ShapeError("the memory is empty: write to it before reading")
        return self._ring

    def _held_waiting(self) -> WaitingTokens:
        assert self._waiting is not None  # It comes and goes with the ring.
        return self._waiting

    def _held_chunks(self) -> Tensor:
        """Count each row's chunks that can be retrieved: ``(rows,)``, int64, on the CPU."""
        ring = self._held_ring()
        return (ring.written - ring.first).clamp(max=self._capacity_chunks)

    def _forget_everything(self) -> None:
        self._ring: ChunkRing | None = None
        self._waiting: WaitingTokens | None = None
        self._indexes: list[RetrievalBackend] = []
        self._index_offsets = torch.zeros(0, dtype=torch.int64)
        self._documents = Documents()
        self.tokenizer = None
        # The checksum of the manifest that these contents go on from, if there is one.
        self._saved_as = None
        self.reading = ()

    def _allocate(self, rows: int, *, slots: int | None = None) -> None:
        heads = self.num_key_value_heads
        self._indexes = [self._make_index(rows * heads) for _ in range(self.num_layers)]
        self._index_offsets = torch.zeros(rows, dtype=torch.int64)
        shape = (self.num_layers, rows, heads, self.chunk_size, self.head_dim)
        self._ring = ChunkRing(
            shape,
            slots=self._capacity_chunks + self._slack_chunks + 1,
            dtype=self.dtype,
            device=self.device if self.storage == "device" else torch.device("cpu"),
            slots_now=slots,
        )
        self._waiting = WaitingTokens(
            shape,
            overlap=self.overlap,
            dtype=torch.promote_types(self.dtype, torch.float32),
            device=self.device,
        )

    def _lanes(self, rows: Tensor) -> list[int]:
        heads = torch.arange(self.num_key_value_heads)
        lanes: list[int] = (rows.unsqueeze(1) * self.num_key_value_heads + heads).flatten().tolist()
        return lanes


def _join_rows(tensors: Tensor) -> Tensor:
    """Join all rows' tokens: ``(layers, B, H, T, D) -> (layers, 1, H, B * T, D)``."""
    return tensors.transpose(1, 2).flatten(2, 3).unsqueeze(1)
