"""The two kinds of tensor files of a bank: shards of chunks, and the state beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memlayer.errors import MemoryFormatError
from memlayer.memory.manifest import Manifest, Shard
from memlayer.memory.ring import ChunkRing, Chunks
from memlayer.memory.tensor_files import Expected, is_finite, map_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory.bank import MemoryBank
    from memlayer.memory.manifest import SavedFile


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What is not in whole chunks.

    Attributes:
        keys: ``(layers, rows, H_kv, O + C - 1, D)``, float32 or more. Of waiting tokens.
        values: likewise.
        sources: ``(rows, O + C - 1, 3)``, int64.
        open_ids: ``(n,)``, int64. Token ids of the open segments, one row's after the other's.
    """

    keys: Tensor
    values: Tensor
    sources: Tensor
    open_ids: Tensor


def write_shard(directory: Path, name: str, ring: ChunkRing, start: Tensor, stop: Tensor) -> Shard:
    """Write each row's chunks from ``start`` to ``stop``, both ``(rows,)``, into one file."""
    chunks = ring.read(start, stop)
    file = write_tensors(
        directory,
        name,
        {
            "keys": chunks.keys,
            "values": chunks.values,
            "chunk_keys": chunks.chunk_keys,
            "sources": chunks.sources,
        },
    )
    return Shard(file=file, first=tuple(start.tolist()), counts=tuple(chunks.counts.tolist()))


def write_state(directory: Path, name: str, bank: MemoryBank) -> SavedFile:
    """Write what a bank has that is not in whole chunks."""
    waiting = bank._held_waiting()
    open_ids = [place.open_ids for place in bank.reading]
    return write_tensors(
        directory,
        name,
        {
            "keys": waiting.keys,
            "values": waiting.values,
            "sources": waiting.sources,
            "open_ids": torch.cat([torch.empty(0, dtype=torch.int64), *open_ids]),
        },
    )


def read_shard(directory: Path, shard: Shard, manifest: Manifest, *, verify: bool) -> Chunks:
    """Check one shard and map it into memory.

    Raises:
        MemoryFormatError: if it is missing or damaged.
    """
    settings, rows, chunks = manifest.settings, manifest.rows, max(shard.counts)
    lanes = (settings.num_layers, rows, settings.num_key_value_heads)
    dtype = _dtype(directory, manifest)
    tokens = Expected(dtype, (*lanes, chunks, settings.chunk_size, settings.head_dim))
    expected = {
        "keys": tokens,
        "values": tokens,
        "chunk_keys": Expected(torch.float32, (*lanes, chunks, settings.head_dim)),
        "sources": Expected(torch.int64, (rows, chunks, settings.chunk_size, 3)),
    }
    tensors = map_tensors(directory, shard.file, expected, verify=verify)
    if verify:
        _check_contents(directory, shard.file, manifest, tensors)
    return Chunks(
        keys=tensors["keys"],
        values=tensors["values"],
        chunk_keys=tensors["chunk_keys"],
        sources=tensors["sources"],
        counts=torch.tensor(shard.counts),
    )


def read_state(directory: Path, manifest: Manifest, *, verify: bool) -> SavedState:
    """Check the state's file and copy it into memory.

    Raises:
        MemoryFormatError: if it is missing or damaged.
    """
    assert manifest.state is not None
    settings, rows, waiting = manifest.settings, manifest.rows, manifest.settings.waiting_room
    lanes = (settings.num_layers, rows, settings.num_key_value_heads)
    dtype = torch.promote_types(_dtype(directory, manifest), torch.float32)
    tokens = Expected(dtype, (*lanes, waiting, settings.head_dim))
    open_tokens = sum(place.open_tokens for place in manifest.reading)
    expected = {
        "keys": tokens,
        "values": tokens,
        "sources": Expected(torch.int64, (rows, waiting, 3)),
        "open_ids": Expected(torch.int64, (open_tokens,)),
    }
    tensors = map_tensors(directory, manifest.state, expected, verify=verify)
    if verify:
        _check_contents(directory, manifest.state, manifest, tensors)
    # A file of a few kilobytes is copied: it changes with every save.
    return SavedState(**{name: tensor.clone() for name, tensor in tensors.items()})


def _dtype(directory: Path, manifest: Manifest) -> torch.dtype:
    kinds = {
        "float64": torch.float64,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    name = manifest.settings.dtype
    if name not in kinds:
        raise MemoryFormatError(
            f"the bank in {directory} has dtype={name[:40]!r}, known are {', '.join(kinds)}"
        )
    return kinds[name]


def _check_contents(
    directory: Path, file: SavedFile, manifest: Manifest, tensors: dict[str, Tensor]
) -> None:
    """Refuse numbers that could not have been written, however good their checksum."""
    path = directory / file.name
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise MemoryFormatError(f"{path} is damaged: {name} is not finite")
    sources = tensors["sources"]
    if sources.numel() and (
        int(sources.min()) < -1 or int(sources[..., 1].max()) >= len(manifest.documents)
    ):
        raise MemoryFormatError(f"{path} is damaged: sources name documents that are not there")
    if "open_ids" in tensors and bool((tensors["open_ids"] < 0).any()):
        raise MemoryFormatError(f"{path} is damaged: open_ids must not be negative")
