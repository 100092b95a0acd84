"""Documents from files: plain text, JSON lines, Parquet, and folders of these.

Plain text is one document a file, whatever the extension; JSON lines and Parquet are one a record.
Documents are read as they are asked for, so that a file need not fit in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from memlayer.data.documents import Document
from memlayer.data.records import COMPRESSED, read_records, text_of_record
from memlayer.errors import DataError

logger = logging.getLogger(__name__)

_PARQUET_ROWS = 256
"""Decoded at a time."""


class NotTextError(DataError):
    """A file holds no text at all; in a folder it is left out, alone it is an error."""


def read_file(path: Path, name: str, text_field: str) -> Iterator[Document]:
    """Give the documents of one file, one at a time; blank ones are left out, which is logged.

    Args:
        path: where it is.
        name: what its documents' ids start with.
        text_field: field or column of the text in JSON lines and Parquet.

    Raises:
        DataError: if the file cannot be read, or is not what its extension says.
        NotTextError: if it is empty, binary, or not UTF-8.
    """
    kept = blank = 0
    try:
        for document in _documents_of(path, name, text_field):
            if not document.text or document.text.isspace():
                blank += 1
                continue
            kept += 1
            yield document
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not kept:
        raise NotTextError(f"{path} holds no text; give a file with at least one document")
    if blank:
        logger.warning("left out %d blank documents of %s", blank, path)


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


def read_folder(folder: Path, text_field: str) -> Iterator[Document]:
    """Give the documents of all files below a folder, sorted by path, one at a time.

    Hidden files and folders are skipped; files without text are left out and logged.

    Raises:
        DataError: if nothing is left, or a JSON lines or Parquet file is broken.
    """
    empty = True
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        try:
            for document in read_file(path, name.as_posix(), text_field):
                empty = False
                yield document
        except NotTextError:
            left_out.append(name.as_posix())
    if left_out:
        logger.warning(
            "left out %d files of %s that are empty or not UTF-8 text: %s",
            len(left_out),
            folder,
            ", ".join(left_out),
        )
    if empty:
        raise DataError(
            f"the folder {folder} holds no text ({len(left_out)} files left out); give a folder "
            "with UTF-8 text, .jsonl or .parquet files"
        )


def _documents_of(path: Path, name: str, text_field: str) -> Iterator[Document]:
    suffixes = tuple(path.name.lower().split(".")[1:])
    if suffixes[-1:] == ("parquet",):
        yield from _read_parquet(path, name, text_field)
    elif suffixes[-1:] == ("jsonl",) or suffixes[-2:] in COMPRESSED:
        yield from _read_json_lines(path, name, text_field)
    else:
        yield Document(id=name, text=_decode(path.read_bytes(), path))


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


def _read_json_lines(path: Path, name: str, text_field: str) -> Iterator[Document]:
    for place, record in read_records(path):
        text = text_of_record(record, text_field, place)
        number = place.rpartition(":")[2]
        yield Document(id=str(record.get("id", f"{name}:{number}")), text=text)


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f'{path} needs the pyarrow package: pip install "memlayer-lm[train]"'
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise DataError(
                    f"{path} has no column {text_field!r}, only {', '.join(columns)}; "
                    "name the text's column with text_field"
                )
            wanted = [column for column in ("id", text_field) if column in columns]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Document(
                        id=str(row.get("id", f"{name}:{number}")),
                        text=text_of_record(row, text_field, f"{path}, row {number},"),
                    )
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a whole Parquet file ({str(error).splitlines()[0]}); copy or download "
            "it again"
        ) from error
