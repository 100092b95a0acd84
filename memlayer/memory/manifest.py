"""A bank directory's manifest: what the bank is of, and which files hold it.

    manifest.json                   this; replaced in one step, so it names the old or the new state
    shard-00000007.safetensors      whole chunks, never changed once a manifest names it
    state-00000009.safetensors      tokens that wait for their chunk, the open segments' token ids
    index-00000009/0/...            what each memory layer's backend saved, where that was asked for
    lock                            who writes

A manifest is untrusted when it is read: every field is checked, and whatever it says of a file is
checked against the file before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memlayer.errors import MemoryFormatError
from memlayer.json_fields import Fields, read_json_object
from memlayer.memory.documents import DocumentRecord

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
LARGEST_MANIFEST = 256 * 2**20

SHARD_NAME = re.compile(r"shard-(\d{8,15})\.safetensors", re.ASCII)
STATE_NAME = re.compile(r"state-(\d{8,15})\.safetensors", re.ASCII)
INDEX_FOLDER = re.compile(r"index-(\d{8,15})", re.ASCII)
_INDEX_FILE = re.compile(
    r"index-(\d{8,15})/\d{1,6}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}){1,8}", re.ASCII
)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SavedFile:
    """A file that a manifest names.

    Attributes:
        name: relative to the bank's directory, parts joined by ``/``.
        size: in bytes.
        sha256: of all of it.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A run of whole chunks of every row.

    Attributes:
        file: what holds them.
        first: the number of each row's first chunk in it.
        counts: how many chunks of each row are in it.
    """

    file: SavedFile
    first: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """One past each row's last chunk."""
        return tuple(a + b for a, b in zip(self.first, self.counts, strict=True))


@dataclass(frozen=True, kw_only=True)
class BankSettings:
    """What has to be alike for a saved bank to mean the same in another one.

    Attributes:
        identity: the model and memory layers that keys and values are of.
        chunk_size: tokens behind one index entry.
        num_layers: memory layers.
        num_key_value_heads: H_kv.
        head_dim: D.
        dtype: of stored keys and values.
        shared: one memory for all rows of a batch.
        overlap: newest tokens of a row that wait because a window still contains them.
    """

    identity: str
    chunk_size: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: str
    shared: bool
    overlap: int

    @property
    def waiting_room(self) -> int:
        """Tokens of a row that can wait."""
        return self.overlap + self.chunk_size - 1


@dataclass(frozen=True, kw_only=True)
class SavedReading:
    """Where the reading of one batch row stands; see `memlayer.memory.reading.RowReading`."""

    document: int
    offset: int
    open_tokens: int


@dataclass(frozen=True, kw_only=True)
class SavedIndexes:
    """Search indexes as their backend saved them.

    Attributes:
        kind: the backend's class; another one builds its index anew.
        offsets: what each row's insertion numbers lack to be chunk numbers.
        files: of all memory layers.
    """

    kind: str
    offsets: tuple[int, ...]
    files: tuple[SavedFile, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One state of a bank on disk.

    Attributes:
        memlayer_version: that wrote it.
        lineage: the same for all states of one bank that were saved on top of each other.
        generation: counts the states of a directory.
        settings: what the bank is of.
        capacity: tokens per row.
        written: chunks written to each row since its last clear.
        held: how many of them can be retrieved.
        waiting: tokens of each row that are in no whole chunk yet.
        reading: where each batch row's text stands.
        documents: what was memorized.
        tokenizer: a fingerprint of the tokenizer, or None.
        shards: oldest chunks first.
        state: waiting tokens and open segments; None in a bank without rows.
        indexes: saved search indexes; None where they are built from the shards.
    """

    memlayer_version: str
    lineage: str
    generation: int
    settings: BankSettings
    capacity: int
    written: tuple[int, ...]
    held: tuple[int, ...]
    waiting: tuple[int, ...]
    reading: tuple[SavedReading, ...]
    documents: tuple[DocumentRecord, ...]
    tokenizer: str | None
    shards: tuple[Shard, ...]
    state: SavedFile | None
    indexes: SavedIndexes | None

    @property
    def rows(self) -> int:
        """Memories held."""
        return len(self.written)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held by each row, waiting ones included."""
        return tuple(
            min(
                held * self.settings.chunk_size + max(waiting - self.settings.overlap, 0),
                self.capacity,
            )
            for held, waiting in zip(self.held, self.waiting, strict=True)
        )

    @property
    def oldest(self) -> tuple[int, ...]:
        """The number of each row's oldest chunk that can be retrieved."""
        return tuple(a - b for a, b in zip(self.written, self.held, strict=True))

    def files(self) -> Iterator[SavedFile]:
        """Go through all files that hold the bank."""
        for shard in self.shards:
            yield shard.file
        if self.state is not None:
            yield self.state
        if self.indexes is not None:
            yield from self.indexes.files

    def to_json(self) -> bytes:
        """Give the file's content, its checksum included."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        content["checksum"] = _checksum(content)
        return (json.dumps(content, indent=1) + "\n").encode("utf-8")

    @property
    def checksum(self) -> str:
        """The checksum that the file has."""
        return _checksum({"format_version": FORMAT_VERSION, **asdict(self)})


def read_manifest(directory: Path) -> Manifest:
    """Read and check a bank directory's manifest.

    Raises:
        MemoryFormatError: if it is missing, damaged or of another format.
    """
    path = directory / MANIFEST_NAME
    try:
        content = read_json_object(path, largest=LARGEST_MANIFEST, error=MemoryFormatError)
    except FileNotFoundError as error:
        raise MemoryFormatError(f"there is no memory bank in {directory}") from error
    version = content.values.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise MemoryFormatError(
            f"{path} has format_version {version!r:.40}, this memlayer reads {FORMAT_VERSION}; it "
            f"was written by memlayer {content.values.get('memlayer_version', '?')!r:.40}"
        )
    rest = {name: value for name, value in content.values.items() if name != "checksum"}
    try:
        expected = _checksum(rest)
    except (ValueError, RecursionError) as error:
        raise MemoryFormatError(f"{path} is damaged: {error}") from error
    if content.values.get("checksum") != expected:
        raise MemoryFormatError(f"{path} does not match its checksum: it was changed")
    return _parse(Fields(rest, path, MemoryFormatError))


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _parse(content: Fields) -> Manifest:
    content.expect_only(["format_version", *(field.name for field in fields(Manifest))])
    rows = len(content.wholes("written"))
    documents = tuple(_parse_document(item) for item in content.objects("documents"))
    if len({document.name for document in documents}) < len(documents):
        raise content.damaged("documents", "of different names")
    state, indexes = content.optional_object("state"), content.optional_object("indexes")
    manifest = Manifest(
        memlayer_version=content.text("memlayer_version"),
        lineage=content.text("lineage"),
        generation=content.whole("generation", least=1),
        settings=_parse_settings(content.object("settings")),
        capacity=content.whole("capacity", least=1),
        written=content.wholes("written"),
        held=content.wholes("held", length=rows),
        waiting=content.wholes("waiting", length=rows),
        reading=tuple(_parse_reading(item) for item in content.objects("reading")),
        documents=documents,
        tokenizer=content.optional_text("tokenizer"),
        shards=tuple(_parse_shard(item, rows) for item in content.objects("shards")),
        state=None if state is None else _parse_file(state, STATE_NAME),
        indexes=None if indexes is None else _parse_indexes(indexes, rows),
    )
    _check(manifest, content)
    return manifest


def _parse_settings(content: Fields) -> BankSettings:
    content.expect_only([field.name for field in fields(BankSettings)])
    return BankSettings(
        identity=content.text("identity"),
        chunk_size=content.whole("chunk_size", least=1),
        num_layers=content.whole("num_layers", least=1),
        num_key_value_heads=content.whole("num_key_value_heads", least=1),
        head_dim=content.whole("head_dim", least=1),
        dtype=content.text("dtype"),
        shared=content.truth("shared"),
        # Banks that were saved before there were overlapping windows do not name it.
        overlap=content.whole("overlap") if "overlap" in content.values else 0,
    )


def _parse_document(content: Fields) -> DocumentRecord:
    content.expect_only([field.name for field in fields(DocumentRecord)])
    if not content.text("name"):
        raise content.damaged("name", "text that is not empty")
    return DocumentRecord(
        name=content.text("name"),
        tokens=content.whole("tokens"),
        sha256=content.optional_text("sha256"),
        complete=content.truth("complete"),
    )


def _parse_reading(content: Fields) -> SavedReading:
    content.expect_only([field.name for field in fields(SavedReading)])
    document = content.values.get("document")
    return SavedReading(
        document=-1 if isinstance(document, int) and document == -1 else content.whole("document"),
        offset=content.whole("offset"),
        open_tokens=content.whole("open_tokens"),
    )


def _parse_shard(content: Fields, rows: int) -> Shard:
    content.expect_only([field.name for field in fields(Shard)])
    return Shard(
        file=_parse_file(content.object("file"), SHARD_NAME),
        first=content.wholes("first", length=rows),
        counts=content.wholes("counts", length=rows),
    )


def _parse_indexes(content: Fields, rows: int) -> SavedIndexes:
    content.expect_only([field.name for field in fields(SavedIndexes)])
    return SavedIndexes(
        kind=content.text("kind"),
        offsets=content.wholes("offsets", length=rows),
        files=tuple(_parse_file(item, _INDEX_FILE) for item in content.objects("files")),
    )


def _parse_file(content: Fields, pattern: re.Pattern[str]) -> SavedFile:
    content.expect_only([field.name for field in fields(SavedFile)])
    if not pattern.fullmatch(content.text("name")):
        raise content.damaged("name", "the name of a bank's file")
    if not _SHA256.fullmatch(content.text("sha256")):
        raise content.damaged("sha256", "64 hexadecimal digits")
    return SavedFile(
        name=content.text("name"), size=content.whole("size"), sha256=content.text("sha256")
    )


def _check(manifest: Manifest, content: Fields) -> None:
    """Check the fields against each other."""
    chunk_size, limit = manifest.settings.chunk_size, manifest.capacity
    for name, fits in (
        ("held", all(n <= w for n, w in zip(manifest.held, manifest.written, strict=True))),
        ("held", all(n * chunk_size <= limit for n in manifest.held)),
        ("waiting", all(n <= manifest.settings.waiting_room for n in manifest.waiting)),
        ("state", (manifest.state is None) == (manifest.rows == 0)),
        ("reading", all(r.document < len(manifest.documents) for r in manifest.reading)),
        ("shards", _are_gapless(manifest)),
        ("settings", not manifest.settings.shared or manifest.rows <= 1),
    ):
        if not fits:
            raise content.damaged(name, "consistent with the other fields")
    names = [file.name for file in manifest.files()]
    if len(set(names)) < len(names):
        raise content.damaged("shards", "of files with different names")


def _are_gapless(manifest: Manifest) -> bool:
    """Say whether the shards hold every chunk that can be retrieved, in order, none twice."""
    reached = list(manifest.oldest)
    for shard in manifest.shards:
        for row, (first, stop) in enumerate(zip(shard.first, shard.stop, strict=True)):
            if stop <= reached[row]:
                continue
            if first > reached[row]:
                return False
            reached[row] = stop
    return tuple(reached) == manifest.written
