"""Documents from a data set of the Hugging Face Hub, or a local folder in its form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlayer.data.documents import Document, Split
from memlayer.data.records import text_of_record
from memlayer.errors import DataError
from memlayer.hub import reason_unreachable

OWN_SPLITS: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


def read_hub_dataset(name: str, text_field: str) -> Iterator[Document]:
    """Give the records of a data set as documents, one at a time out of its files on disk.

    A data set that has both a train and a validation split keeps its own; of any other, all records
    are split by hash.

    Args:
        name: ``NAME`` or ``NAME:CONFIG``; NAME is an id on the Hub or a local folder.
        text_field: column of the text.

    Raises:
        DataError: if the data set cannot be loaded, or has no such column.
    """
    repository, _, config = name.partition(":")
    parts = _load(repository, config or None)
    has_own_splits = {"train", "validation"} <= {OWN_SPLITS.get(part) for part in parts}
    empty = True
    for part, records in parts.items():
        for number, record in enumerate(records):
            own = part if has_own_splits else None
            document = _document(record, f"{name}/{part}/{number}", text_field, own)
            if document.text and not document.text.isspace():
                empty = False
                yield document
    if empty:
        raise DataError(f"the data set {name!r} holds no text in column {text_field!r}")


def _document(record: dict[str, Any], place: str, text_field: str, part: str | None) -> Document:
    return Document(
        id=str(record.get("id", place)),
        text=text_of_record(record, text_field, f"record {place}"),
        split=OWN_SPLITS.get(part) if part else None,
    )


def _load(repository: str, config: str | None) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'hf:{repository} needs the datasets package: pip install "memlayer-lm[train]"'
        ) from error
    if not Path(repository).is_dir() and not datasets.config.HF_HUB_OFFLINE:
        reason = reason_unreachable("dataset", repository)
        if reason is not None:
            raise DataError(
                f"cannot load data set {repository!r} from the Hugging Face Hub ({reason}); give "
                "a local folder or file, or set HF_HUB_OFFLINE=1 to use a copy in the cache"
            )
    try:
        return dict(datasets.load_dataset(repository, config))
    except Exception as error:  # whatever a data set's builder raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise DataError(
            f"cannot load data set {repository!r} ({reason}); name a configuration with "
            f"hf:{repository}:CONFIG, or give its files"
        ) from error
