"""A bank on disk: safetensors and a JSON manifest, written whole or not at all.

    DIR/manifest.json        format, settings, identity, checksum of the tensors
    DIR/bank.safetensors     keys, values (chunks in order of age), counters, tails
    DIR/index-0/ ...         what each memory layer's backend saves

The directory is written beside its place under another name and then renamed, so that a kill leaves
the old bank or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memlayer.errors import MemoryFormatError
from memlayer.memory.ring import Chunks

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory.bank import MemoryBank

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_TENSORS = "bank.safetensors"


def save(bank: MemoryBank, directory: Path) -> None:
    """Write a bank; what stood at ``directory`` before is replaced in one step."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _write(bank, scratch)
        _replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(bank: MemoryBank, directory: Path) -> None:
    """Check a saved bank against this one's settings, then take over its contents."""
    manifest = _read_manifest(directory)
    for name, value in _settings(bank).items():
        if manifest.get(name) != value:
            raise MemoryFormatError(
                f"the bank in {directory} has {name}={manifest.get(name)!r}, this model needs "
                f"{value!r}; load it with the model and settings that wrote it"
            )
    tensors = _read_tensors(directory, manifest)
    rows = manifest.get("rows")
    if not isinstance(rows, int) or rows < 0:
        raise MemoryFormatError(f"the bank in {directory} has rows={rows!r}; it is damaged")
    if rows == 0:
        bank.clear()
        return
    _restore(bank, rows, tensors, directory)


def _write(bank: MemoryBank, directory: Path) -> None:
    manifest = {"format_version": FORMAT_VERSION, **_settings(bank), "rows": bank.rows}
    if bank.rows:
        path = directory / _TENSORS
        save_file(_contents(bank), path)
        _sync(path)
        manifest["sha256"] = _checksum(path)
        for number, index in enumerate(bank._indexes):
            place = directory / f"index-{number}"
            place.mkdir()
            index.save(place)
    path = directory / _MANIFEST
    path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    _sync(path)


def _settings(bank: MemoryBank) -> dict[str, Any]:
    """What has to be alike for a saved bank to mean the same in this one."""
    return {
        "identity": bank.identity,
        "capacity": bank.capacity,
        "chunk_size": bank.chunk_size,
        "num_layers": bank.num_layers,
        "num_key_value_heads": bank.num_key_value_heads,
        "head_dim": bank.head_dim,
        "dtype": str(bank.dtype).removeprefix("torch."),
        "shared": bank.shared,
    }


def _contents(bank: MemoryBank) -> dict[str, Tensor]:
    ring, waiting = bank._held_ring(), bank._held_waiting()
    held = bank._held_chunks()
    chunks = ring.read(ring.written - held, ring.written)
    return {
        "keys": chunks.keys,
        "values": chunks.values,
        "chunk_keys": chunks.chunk_keys,
        "sources": chunks.sources,
        "held": held,
        "written": ring.written.clone(),
        "tail_keys": waiting.keys.contiguous(),
        "tail_values": waiting.values.contiguous(),
        "tail_sources": waiting.sources.contiguous(),
        "tail_lengths": waiting.lengths.clone(),
    }


def _restore(bank: MemoryBank, rows: int, tensors: dict[str, Tensor], directory: Path) -> None:
    before = bank.__dict__.copy()
    try:
        bank._forget_everything()
        bank._allocate(rows)
        ring, waiting = bank._held_ring(), bank._held_waiting()
        held, written = tensors["held"], tensors["written"]
        ring.append(
            Chunks(
                keys=tensors["keys"].to(bank.device),
                values=tensors["values"].to(bank.device),
                chunk_keys=tensors["chunk_keys"].to(bank.device),
                sources=tensors["sources"],
                counts=held,
            )
        )
        # Numbers go on from where they were: chunk `written - held` lies in slot 0.
        ring.base, ring.written = held - written, written.clone()
        waiting.keys = tensors["tail_keys"].to(bank.device)
        waiting.values = tensors["tail_values"].to(bank.device)
        waiting.sources = tensors["tail_sources"]
        waiting.lengths = tensors["tail_lengths"]
        for number, index in enumerate(bank._indexes):
            index.load(directory / f"index-{number}")
            if index.counts().view(rows, -1).ne(held.unsqueeze(1)).any():
                raise MemoryFormatError(
                    f"index-{number} of the bank in {directory} holds other chunks than its keys; "
                    "it is damaged"
                )
    except (KeyError, IndexError, RuntimeError) as error:
        bank.__dict__.update(before)
        raise MemoryFormatError(f"the bank in {directory} is damaged: {error}") from error
    except MemoryFormatError:
        bank.__dict__.update(before)
        raise


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MemoryFormatError(f"there is no memory bank in {directory}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MemoryFormatError(f"{path} is damaged: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise MemoryFormatError(
            f"{path} has format_version {version!r}, this memlayer reads {FORMAT_VERSION}"
        )
    return dict(manifest)


def _read_tensors(directory: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    if manifest.get("rows") == 0:
        return {}
    path = directory / _TENSORS
    try:
        if _checksum(path) != manifest.get("sha256"):
            raise MemoryFormatError(
                f"{path} does not match its checksum: it was truncated or changed; memorize again"
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise MemoryFormatError(f"{path} cannot be read: {error}") from error


def _replace(scratch: Path, directory: Path) -> None:
    if not directory.exists():
        os.rename(scratch, directory)
        return
    # A directory cannot be renamed over a full one: the old steps aside for an instant.
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    os.rename(directory, old / directory.name)
    os.rename(scratch, directory)
    shutil.rmtree(old)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
