"""Records of JSON lines, plain or compressed, read one line at a time."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from memlayer.errors import DataError

COMPRESSED = {("jsonl", "gz"), ("jsonl", "zst")}
"""Last two extensions of a compressed file of JSON lines."""

_BLOCK_BYTES = 2**20


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give a JSON lines file's records, each with its place (``FILE:LINE``).

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``.

    Raises:
        DataError: if it is damaged, or a line is not one JSON object.
        OSError: if it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        lines = _gzip_lines(path)
    elif suffix == ".zst":
        lines = _lines(_zstandard_blocks(path))
    else:
        lines = _plain_lines(path)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _parse_record(line, place)


def plain_or_compressed(path: Path) -> Path:
    """Give ``path``, or that of the compressed file beside it where only that exists."""
    if not path.is_file():
        for suffix in (".gz", ".zst"):
            compressed = path.with_name(path.name + suffix)
            if compressed.is_file():
                return compressed
    return path


def text_of_record(record: dict[str, Any], text_field: str, place: str) -> str:
    """Give a record's text.

    Raises:
        DataError: if it has none, or one that is no string; ``place`` says where.
    """
    if text_field not in record:
        raise DataError(
            f"{place} has no field {text_field!r}, only {', '.join(sorted(record)) or 'none'}; "
            "name the text's field with text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place} has a field {text_field!r} of type {type(text).__name__}; it must be a string"
        )
    return text


def _plain_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\n")


def _gzip_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            for line in file:
                yield line.rstrip(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}); copy or download it again"
        ) from error


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _zstandard_blocks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f'{path} needs the zstandard package: pip install "memlayer-lm[train]"'
        ) from error
    frame = None  # one after the other
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            while block:
                if frame is None:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise DataError(
                        f"{path} is not a whole zstd file ({error}); copy or download it again"
                    ) from error
                if not frame.eof:
                    break
                block, frame = frame.unused_data, None
    if frame is not None:
        raise DataError(
            f"{path} is not a whole zstd file (it ends early); copy or download it again"
        )


def _parse_record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} is not JSON ({error.msg} at column {error.colno}); "
            "every line must be one JSON object"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8 (byte 0x{line[error.start]:02x} at offset {error.start} of the "
            "line); convert the file to UTF-8"
        ) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{place} is a JSON {type(record).__name__}; every line must be one JSON object"
        )
    return record
