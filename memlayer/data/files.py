"""Documents from files: plain text, JSON lines, Parquet, and folders of these.

Plain text is one document a file, whatever the extension; JSON lines and Parquet are one a record.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memlayer.data.documents import Document
from memlayer.errors import DataError

logger = logging.getLogger(__name__)


class NotTextError(DataError):
    """A file holds no text at all; in a folder it is left out, alone it is an error."""


def read_file(path: Path, name: str, text_field: str) -> list[Document]:
    """Give the documents of one file.

    Args:
        path: where it is.
        name: what its documents' ids start with.
        text_field: field or column of the text in JSON lines and Parquet.

    Raises:
        DataError: if the file cannot be read, or is not what its extension says.
        NotTextError: if it is empty, binary, or not UTF-8.
    """
    suffixes = tuple(path.name.lower().split(".")[1:])
    try:
        if suffixes[-1:] == ("parquet",):
            documents = _read_parquet(path, name, text_field)
        elif suffixes[-1:] == ("jsonl",) or suffixes[-2:] in _DECOMPRESS:
            documents = _read_json_lines(path, name, text_field)
        else:
            documents = [Document(id=name, text=_decode(path.read_bytes(), path))]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return _with_text(documents, path)


def read_text(path: Path) -> str:
    """Give a text file's whole text, whatever its extension.

    Raises:
        DataError: if the file cannot be read.
        NotTextError: if it is binary, or not UTF-8.
    """
    try:
        return _decode(path.read_bytes(), path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_folder(folder: Path, text_field: str) -> list[Document]:
    """Give the documents of all files below a folder, sorted by path.

    Hidden files and folders are skipped; files without text are left out and logged.

    Raises:
        DataError: if nothing is left, or a JSON lines or Parquet file is broken.
    """
    documents: list[Document] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        try:
            documents += read_file(path, name.as_posix(), text_field)
        except NotTextError:
            left_out.append(name.as_posix())
    if left_out:
        logger.warning(
            "left out %d files of %s that are empty or not UTF-8 text: %s",
            len(left_out),
            folder,
            ", ".join(left_out),
        )
    if not documents:
        raise DataError(
            f"the folder {folder} holds no text ({len(left_out)} files left out); give a folder "
            "with UTF-8 text, .jsonl or .parquet files"
        )
    return documents


def _decode(content: bytes, path: Path) -> str:
    zero = content.find(b"\0")
    if zero >= 0:
        raise NotTextError(
            f"{path} is binary (a NUL byte at offset {zero}); give a text file, .jsonl or .parquet"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotTextError(
            f"{path} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}); "
            "convert it to UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _with_text(documents: list[Document], path: Path) -> list[Document]:
    """Leave out blank documents; refuse a file that has no others."""
    kept = [document for document in documents if document.text and not document.text.isspace()]
    if not kept:
        raise NotTextError(f"{path} holds no text; give a file with at least one document")
    if len(kept) < len(documents):
        logger.warning("left out %d blank documents of %s", len(documents) - len(kept), path)
    return kept


def _read_gzip(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file ({error}); copy or download it again"
        ) from error


def _read_zstandard(path: Path) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            f'{path} needs the zstandard package: pip install "memlayer-lm[train]"'
        ) from error
    content, rest = [], path.read_bytes()
    while rest:  # one frame after the other
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            content.append(frame.decompress(rest))
        except zstandard.ZstdError as error:
            raise DataError(
                f"{path} is not a whole zstd file ({error}); copy or download it again"
            ) from error
        if not frame.eof:
            raise DataError(
                f"{path} is not a whole zstd file (it ends early); copy or download it again"
            )
        rest = frame.unused_data
    return b"".join(content)


_DECOMPRESS: dict[tuple[str, ...], Callable[[Path], bytes]] = {
    ("jsonl", "gz"): _read_gzip,
    ("jsonl", "zst"): _read_zstandard,
}


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give a JSON lines file's records, each with its place (``FILE:LINE``).

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``.

    Raises:
        DataError: if it is damaged, or a line is not one JSON object.
        OSError: if it cannot be read.
    """
    suffixes = tuple(path.name.lower().split(".")[-2:])
    content = _DECOMPRESS[suffixes](path) if suffixes in _DECOMPRESS else path.read_bytes()
    for number, line in enumerate(content.split(b"\n"), start=1):
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


def _read_json_lines(path: Path, name: str, text_field: str) -> list[Document]:
    documents = []
    for place, record in read_records(path):
        text = text_of_record(record, text_field, place)
        number = place.rpartition(":")[2]
        documents.append(Document(id=str(record.get("id", f"{name}:{number}")), text=text))
    return documents


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


def _read_parquet(path: Path, name: str, text_field: str) -> list[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f'{path} needs the pyarrow package: pip install "memlayer-lm[train]"'
        ) from error
    try:
        columns = parquet.read_schema(path).names
        wanted = [column for column in ("id", text_field) if column in columns]
        rows = parquet.read_table(path, columns=wanted).to_pylist() if text_field in columns else []
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a whole Parquet file ({str(error).splitlines()[0]}); copy or download "
            "it again"
        ) from error
    if text_field not in columns:
        raise DataError(
            f"{path} has no column {text_field!r}, only {', '.join(columns)}; "
            "name the text's column with text_field"
        )
    return [
        Document(
            id=str(row.get("id", f"{name}:{number}")),
            text=text_of_record(row, text_field, f"{path}, row {number},"),
        )
        for number, row in enumerate(rows, start=1)
    ]
