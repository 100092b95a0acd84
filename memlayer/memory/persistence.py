"""Saving a bank into a directory and loading it again; see `memlayer.memory.manifest`.

Saving writes the chunks that the directory does not hold yet into one new shard, and a manifest
that names it; replacing the manifest is the one step at which the old state becomes the new one.
Shards are merged so that each is at least twice as large as the next one: there are few of them,
and each chunk is written again only as often as the bank doubles.
"""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from memlayer import __version__
from memlayer.errors import ConfigError, MemlayerError, MemoryFormatError, ShapeError, StorageError
from memlayer.files import sync_directory, write_atomically
from memlayer.memory.documents import Documents
from memlayer.memory.lock import bank_lock
from memlayer.memory.manifest import (
    INDEX_FOLDER,
    MANIFEST_NAME,
    SHARD_NAME,
    STATE_NAME,
    BankSettings,
    Manifest,
    SavedIndexes,
    SavedReading,
    Shard,
    read_manifest,
)
from memlayer.memory.reading import RowReading
from memlayer.memory.saved_parts import read_shard, read_state, write_shard, write_state
from memlayer.memory.tensor_files import check_file, describe_file

if TYPE_CHECKING:
    from memlayer.memory.bank import MemoryBank
    from memlayer.memory.ring import Chunks
    from memlayer.retrieval import RetrievalBackend

Indexes = Literal["rebuild", "save"]
_ATTEMPTS = 8


# -------------------------------------------------------------------- saving


def save(bank: MemoryBank, directory: Path, *, indexes: Indexes) -> None:
    """Write what the directory does not hold yet; see `MemoryBank.save`."""
    if indexes not in ("rebuild", "save"):
        raise ConfigError(f"indexes must be 'rebuild' or 'save', got {indexes!r}")
    with bank_lock(directory), _storage_errors(directory):
        earlier, generation = _find_earlier(bank, directory)
        try:
            manifest = _write_files(bank, directory, earlier, generation, indexes)
            write_atomically(directory / MANIFEST_NAME, manifest.to_json())
        except BaseException:
            _remove_generation(directory, generation)
            raise
        bank._saved_as = manifest.checksum
        with suppress(OSError):  # What cannot be removed now is removed by the next save.
            _remove_leftovers(directory, manifest)


def _find_earlier(bank: MemoryBank, directory: Path) -> tuple[Manifest | None, int]:
    """Give the manifest if it is an earlier state of this very bank, and a new generation."""
    numbers = [0, *(_generation_of(path) or 0 for path in directory.iterdir())]
    try:
        manifest = read_manifest(directory)
    except MemoryFormatError:
        return None, max(numbers) + 1
    generation = max(*numbers, manifest.generation) + 1
    if bank._saved_as != manifest.checksum:
        return None, generation
    try:
        for shard in manifest.shards:
            check_file(directory, shard.file, verify=False)
    except MemoryFormatError:
        return None, generation  # Damaged since: all of it is written again.
    return manifest, generation


def _write_files(
    bank: MemoryBank,
    directory: Path,
    earlier: Manifest | None,
    generation: int,
    indexes: Indexes,
) -> Manifest:
    shards: list[Shard] = []
    state, saved_indexes = None, None
    written = held = waiting = torch.zeros(0, dtype=torch.int64)
    if bank.rows:
        ring = bank._held_ring()
        written, held, waiting = ring.written, bank._held_chunks(), bank._held_waiting().lengths
        kept = list(earlier.shards) if earlier else []
        shards, start = _plan(kept, written - held, written)
        if (start < written).any():
            name = f"shard-{generation:08d}.safetensors"
            shards.append(write_shard(directory, name, ring, start, written))
        state = write_state(directory, f"state-{generation:08d}.safetensors", bank)
        if indexes == "save":
            saved_indexes = _write_indexes(bank, directory, generation)
    sync_directory(directory)
    return Manifest(
        memlayer_version=__version__,
        lineage=earlier.lineage if earlier else uuid.uuid4().hex,
        generation=generation,
        settings=settings_of(bank),
        capacity=bank.capacity,
        written=tuple(written.tolist()),
        held=tuple(held.tolist()),
        waiting=tuple(waiting.tolist()),
        reading=tuple(
            SavedReading(
                document=place.document, offset=place.offset, open_tokens=len(place.open_ids)
            )
            for place in (bank.reading if bank.rows else ())
        ),
        documents=bank.document_records,
        tokenizer=bank.tokenizer,
        shards=tuple(shards),
        state=state,
        indexes=saved_indexes,
    )


def _plan(
    kept: list[Shard], oldest: torch.Tensor, written: torch.Tensor
) -> tuple[list[Shard], torch.Tensor]:
    """Choose the shards that stay, and where each row's new shard starts."""

    def size(shard: Shard) -> int:
        """Count the chunks of a shard's fullest row that can still be retrieved."""
        first, stop = torch.tensor(shard.first), torch.tensor(shard.stop)
        return int((stop - torch.maximum(first, oldest)).max())

    kept = [shard for shard in kept if size(shard) > 0]
    start = torch.maximum(torch.tensor(kept[-1].stop), oldest) if kept else oldest
    while kept and size(kept[-1]) < 2 * int((written - start).max()):
        start = torch.maximum(torch.tensor(kept.pop().first), oldest)
    return kept, start


def _write_indexes(bank: MemoryBank, directory: Path, generation: int) -> SavedIndexes:
    folder = f"index-{generation:08d}"
    files = []
    for number, index in enumerate(bank._indexes):
        place = directory / folder / str(number)
        place.mkdir(parents=True)
        index.save(place)
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            files.append(describe_file(directory, path.relative_to(directory).as_posix()))
            sync_directory(path.parent)
        sync_directory(place)
    sync_directory(directory / folder)
    return SavedIndexes(
        kind=_kind(bank._indexes[0]),
        offsets=tuple(bank._index_offsets.tolist()),
        files=tuple(files),
    )


def _kind(index: RetrievalBackend) -> str:
    return f"{type(index).__module__}:{type(index).__qualname__}"


def settings_of(bank: MemoryBank) -> BankSettings:
    """Give what has to be alike for a saved bank to mean the same in this one."""
    return BankSettings(
        identity=bank.identity,
        chunk_size=bank.chunk_size,
        num_layers=bank.num_layers,
        num_key_value_heads=bank.num_key_value_heads,
        head_dim=bank.head_dim,
        dtype=str(bank.dtype).removeprefix("torch."),
        shared=bank.shared,
        overlap=bank.overlap,
    )


def _remove_generation(directory: Path, generation: int) -> None:
    """Remove what a save wrote that has failed, unless its manifest is in place all the same."""
    with suppress(OSError, MemoryFormatError):
        if read_manifest(directory).generation == generation:
            return
    with suppress(OSError):
        for path in list(directory.iterdir()):
            if _generation_of(path) == generation:
                _remove(path)


def _remove_leftovers(directory: Path, manifest: Manifest) -> None:
    """Remove the files of older states, and what a killed writer left."""
    used = {file.name.partition("/")[0] for file in manifest.files()}
    for path in list(directory.iterdir()):
        if path.name.startswith(f".{MANIFEST_NAME}.") and path.name.endswith(".tmp"):
            path.unlink()
        elif path.name not in used and _generation_of(path) is not None:
            _remove(path)


def _generation_of(path: Path) -> int | None:
    """Give the state that a file or folder was written for; None if it is none of a bank's."""
    for pattern in (SHARD_NAME, STATE_NAME, INDEX_FOLDER):
        if match := pattern.fullmatch(path.name):
            return int(match.group(1))
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _storage_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "there is no space left on its disk" if full else (error.strerror or str(error))
        raise StorageError(
            f"the bank in {directory} could not be saved: {reason}; it is as it was before"
        ) from error


# -------------------------------------------------------------------- loading


def load(bank: MemoryBank, directory: Path, *, verify: bool) -> None:
    """Check a saved bank against this one's settings, then take over its contents."""
    for _ in range(_ATTEMPTS):
        manifest = read_manifest(directory)
        try:
            _load(bank, directory, manifest, verify=verify)
        except MemoryFormatError:
            # A writer may have replaced files that this manifest names while they were opened.
            if read_manifest(directory).checksum != manifest.checksum:
                continue
            raise
        return
    raise MemoryFormatError(
        f"the bank in {directory} was saved anew {_ATTEMPTS} times while it was loaded; load it "
        "when its writer saves less often"
    )


def _load(bank: MemoryBank, directory: Path, manifest: Manifest, *, verify: bool) -> None:
    _check_settings(bank, directory, manifest)
    for file in manifest.indexes.files if manifest.indexes else ():
        check_file(directory, file, verify=verify)
    before = bank.__dict__.copy()
    try:
        _restore(bank, directory, manifest, verify=verify)
    except (ShapeError, RuntimeError, MemoryError) as error:
        bank.__dict__.update(before)
        raise MemoryFormatError(f"the bank in {directory} is damaged: {error}") from error
    except BaseException:
        bank.__dict__.update(before)
        raise


def _check_settings(bank: MemoryBank, directory: Path, manifest: Manifest) -> None:
    saved, own = manifest.settings, settings_of(bank)
    for name, value in vars(own).items():
        if getattr(saved, name) != value:
            raise MemoryFormatError(
                f"the bank in {directory} has {name}={getattr(saved, name)!r:.200}, this model "
                f"needs {value!r}; load it with the model and settings that wrote it"
            )


def _restore(bank: MemoryBank, directory: Path, manifest: Manifest, *, verify: bool) -> None:
    bank._forget_everything()
    bank._documents = Documents(manifest.documents)
    bank.tokenizer = manifest.tokenizer
    bank._saved_as = manifest.checksum
    if manifest.state is None:
        return
    # A bank of less capacity takes the newest chunks.
    written = torch.tensor(manifest.written)
    held = torch.tensor(manifest.held).clamp(max=bank._capacity_chunks)
    oldest = written - held
    state = read_state(directory, manifest, verify=verify)
    shards = [
        (shard, read_shard(directory, shard, manifest, verify=verify))
        for shard in manifest.shards
        if (torch.tensor(shard.stop) > oldest).any()
    ]
    bank._allocate(manifest.rows, slots=1)
    ring, waiting = bank._held_ring(), bank._held_waiting()
    if len(shards) == 1 and ring.can_adopt(shards[0][1]):
        ring.adopt(shards[0][1], first=torch.tensor(shards[0][0].first), written=written)
        ring.first = oldest
    else:
        ring.make_room(int(held.max()))
        ring.first, ring.base, ring.written = oldest, -oldest, written
        for shard, chunks in shards:
            for row in range(manifest.rows):
                start = max(shard.first[row], int(oldest[row]))
                ring.place(row, start, chunks, skip=start - shard.first[row])
    device = bank.device
    waiting.keys, waiting.values = state.keys.to(device), state.values.to(device)
    waiting.sources, waiting.lengths = state.sources, torch.tensor(manifest.waiting)
    bank.reading = tuple(
        RowReading(document=place.document, offset=place.offset, open_ids=ids)
        for place, ids in zip(
            manifest.reading,
            state.open_ids.split([place.open_tokens for place in manifest.reading]),
            strict=True,
        )
    )
    indexes = manifest.indexes
    if indexes is not None and indexes.kind == _kind(bank._indexes[0]):
        _load_indexes(bank, directory, manifest, indexes)
    else:
        _build_indexes(bank, shards, oldest)


def _build_indexes(
    bank: MemoryBank, shards: list[tuple[Shard, Chunks]], oldest: torch.Tensor
) -> None:
    bank._index_offsets = oldest.clone()
    for shard, chunks in shards:
        for row, (first, stop) in enumerate(zip(shard.first, shard.stop, strict=True)):
            start = max(first, int(oldest[row]))
            if stop <= start:
                continue
            part = slice(start - first, stop - first)
            lanes = bank._lanes(torch.tensor([row]))
            for index, keys in zip(bank._indexes, chunks.chunk_keys, strict=True):
                index.add(keys[row, :, part].to(bank.device), lanes)


def _load_indexes(
    bank: MemoryBank, directory: Path, manifest: Manifest, saved: SavedIndexes
) -> None:
    folders = {file.name.partition("/")[0] for file in saved.files}
    names = {file.name for file in saved.files}
    present = {
        path.relative_to(directory).as_posix()
        for folder in folders
        for path in (directory / folder).rglob("*")
        if not path.is_dir()
    }
    if len(folders) != 1 or present != names:
        raise MemoryFormatError(
            f"the bank in {directory} is damaged: its indexes have other files than its manifest "
            "names"
        )
    bank._index_offsets = torch.tensor(saved.offsets)
    held, kept = torch.tensor(manifest.held), bank._held_chunks()
    for number, index in enumerate(bank._indexes):
        place = directory / next(iter(folders)) / str(number)
        try:
            index.load(place)
        except MemlayerError:
            raise
        except Exception as error:  # Another package's backend may raise anything of its own.
            raise MemoryFormatError(
                f"the index in {place} cannot be read: {error!r:.200}"
            ) from error
        if index.counts().view(manifest.rows, -1).ne(held.unsqueeze(1)).any():
            raise MemoryFormatError(
                f"{place} holds other chunks than the bank's shards; it is damaged"
            )
        for row, surplus in enumerate((held - kept).tolist()):
            if surplus:
                index.remove_oldest(surplus, bank._lanes(torch.tensor([row])))
