"""Looking at a bank's directory without a model: what it holds, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayer.errors import MemoryFormatError
from memlayer.memory.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest
from memlayer.memory.saved_parts import read_shard, read_state
from memlayer.memory.tensor_files import check_file

if TYPE_CHECKING:
    from memlayer.memory.documents import DocumentRecord

_ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class BankInfo:
    """What a bank's manifest says.

    Attributes:
        directory: where it is.
        format_version: of the directory.
        memlayer_version: that wrote it.
        lineage: the same for all states of one bank that were saved on top of each other.
        generation: counts the states of the directory.
        identity: the model and memory layers that keys and values are of.
        capacity: tokens per row.
        chunk_size: tokens behind one index entry.
        num_layers: memory layers.
        num_key_value_heads: H_kv.
        head_dim: D.
        dtype: of stored keys and values.
        shared: one memory for all rows of a batch.
        overlap: newest tokens of a row that wait because a window still contains them.
        rows: memories held.
        lengths: tokens held by each row.
        tokenizer: a fingerprint of the tokenizer, or None.
        documents: what was memorized, by name.
        shards: files that hold whole chunks.
        size: bytes of all files that the manifest names.
        indexes: ``"saved"``, or ``"rebuilt"`` on every load.
    """

    directory: str
    format_version: int
    memlayer_version: str
    lineage: str
    generation: int
    identity: str
    capacity: int
    chunk_size: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: str
    shared: bool
    overlap: int
    rows: int
    lengths: tuple[int, ...]
    tokenizer: str | None
    documents: tuple[DocumentRecord, ...]
    shards: int
    size: int
    indexes: str

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {**asdict(self), "lengths": list(self.lengths), "documents": self._documents()}

    def _documents(self) -> list[dict[str, Any]]:
        return [asdict(document) for document in self.documents]


@dataclass(frozen=True, kw_only=True)
class BankReport:
    """What reading all of a bank's directory found.

    Attributes:
        directory: where it is.
        info: what its manifest says; None if that cannot be read.
        problems: one sentence for each thing that is wrong.
        files: how many files were read.
        size: their bytes.
    """

    directory: str
    info: BankInfo | None
    problems: tuple[str, ...]
    files: int
    size: int

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {
            "directory": self.directory,
            "whole": self.whole,
            "problems": list(self.problems),
            "files": self.files,
            "size": self.size,
            "info": None if self.info is None else self.info.to_dict(),
        }


def bank_exists(directory: str | Path) -> bool:
    """Say whether a bank was ever saved in a directory."""
    return (Path(directory) / MANIFEST_NAME).exists()


def bank_info(directory: str | Path) -> BankInfo:
    """Read what a bank's manifest says, and nothing else.

    Raises:
        MemoryFormatError: if there is no bank, or its manifest is damaged or of another format.
    """
    return _describe(Path(directory), read_manifest(Path(directory)))


def verify_bank(directory: str | Path) -> BankReport:
    """Read all of a bank's directory and report whatever is wrong; nothing is changed.

    A bank may be saved to meanwhile.
    """
    report = _verify(Path(directory))
    for _ in range(_ATTEMPTS):
        if report.whole:
            break
        # A writer may have replaced files that the manifest named.
        again = _verify(Path(directory))
        if again.info == report.info:
            break
        report = again
    return report


def _verify(directory: Path) -> BankReport:
    try:
        manifest = read_manifest(directory)
    except MemoryFormatError as error:
        return BankReport(
            directory=str(directory), info=None, problems=(str(error),), files=0, size=0
        )
    parts: list[Callable[[], object]] = [
        partial(read_shard, directory, shard, manifest, verify=True) for shard in manifest.shards
    ]
    if manifest.state is not None:
        parts.append(partial(read_state, directory, manifest, verify=True))
    if manifest.indexes is not None:
        parts += [
            partial(check_file, directory, file, verify=True) for file in manifest.indexes.files
        ]
    problems = []
    for read in parts:
        try:
            read()
        except MemoryFormatError as error:
            problems.append(str(error))
    files = list(manifest.files())
    return BankReport(
        directory=str(directory),
        info=_describe(directory, manifest),
        problems=tuple(problems),
        files=len(files),
        size=sum(file.size for file in files),
    )


def _describe(directory: Path, manifest: Manifest) -> BankInfo:
    return BankInfo(
        directory=str(directory),
        format_version=FORMAT_VERSION,
        memlayer_version=manifest.memlayer_version,
        lineage=manifest.lineage,
        generation=manifest.generation,
        **asdict(manifest.settings),
        capacity=manifest.capacity,
        rows=manifest.rows,
        lengths=manifest.lengths,
        tokenizer=manifest.tokenizer,
        documents=manifest.documents,
        shards=len(manifest.shards),
        size=sum(file.size for file in manifest.files()),
        indexes="rebuilt" if manifest.indexes is None else "saved",
    )
