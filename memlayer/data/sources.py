"""From the sources that a user names to the documents of one split.

A source is a file, a folder, ``hf:NAME[:CONFIG]``, or the name of a built-in corpus.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from memlayer.data.builtin import BUILTIN_CORPORA
from memlayer.data.documents import DistinctTexts, Document, Split
from memlayer.data.files import read_file, read_folder
from memlayer.data.hub import read_hub_dataset
from memlayer.data.splits import select_split
from memlayer.errors import ConfigError, DataError, UnknownNameError


def load_documents(
    sources: Sequence[str], *, split: Split, seed: int = 0, text_field: str = "text"
) -> list[Document]:
    """Read every source and give the documents of one split, in the order of the sources.

    A document that several sources give is kept once. Different texts under one id get a short hash
    of the text behind it, whichever comes first.

    Args:
        sources: files (any UTF-8 text, ``.jsonl[.gz|.zst]``, ``.parquet``), folders of these,
            ``hf:NAME[:CONFIG]``, or built-in corpora.
        split: ``"all"`` for sources that are a split already.
        seed: of the split.
        text_field: field or column that holds the text in JSON lines, Parquet and data sets.

    Raises:
        DataError: if a source cannot be used as text, or the split would be empty.
        UnknownNameError: if a source is neither a path nor a corpus.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    documents = _unique(iterate_documents(sources, text_field=text_field))
    return select_split(documents, split=split, seed=seed)


def iterate_documents(sources: Sequence[str], *, text_field: str = "text") -> Iterator[Document]:
    """Read every source and give its documents, one at a time, as often as the sources give them.

    Args:
        sources: as for `load_documents`.
        text_field: likewise.

    Raises:
        DataError, UnknownNameError: as for `load_documents`: at once for a source that is not
            there, and for what is wrong inside one when its turn has come.
    """
    check_sources(sources)
    return itertools.chain.from_iterable(_read_source(source, text_field) for source in sources)


def check_sources(sources: Sequence[str]) -> None:
    """Refuse sources that are not there, without reading any.

    Raises:
        ConfigError: if this is no list of sources.
        DataError: if a path does not exist, or is neither a file nor a folder.
        UnknownNameError: if a source is neither a path nor a corpus.
    """
    if isinstance(sources, str) or not sources:
        raise ConfigError(f"sources must be a list of at least one source, got {sources!r}")
    for source in sources:
        path = Path(source)
        if source in BUILTIN_CORPORA or source.startswith("hf:") or path.is_dir() or path.is_file():
            continue
        if path.exists():
            raise DataError(f"{source} is neither a file nor a folder; give one of these")
        if len(path.parts) == 1 and not path.suffix:
            raise UnknownNameError(_unknown_corpus(source, BUILTIN_CORPORA))
        raise DataError(_missing_path(path))


def _read_source(source: str, text_field: str) -> Iterable[Document]:
    if source in BUILTIN_CORPORA:
        return BUILTIN_CORPORA[source]()
    if source.startswith("hf:"):
        return read_hub_dataset(source.removeprefix("hf:"), text_field)
    path = Path(source)
    return (
        read_folder(path, text_field) if path.is_dir() else read_file(path, path.name, text_field)
    )


def _unknown_corpus(source: str, known: Iterable[str]) -> str:
    names = sorted(known)
    nearest = difflib.get_close_matches(source, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return (
        f"{source!r} is no file or folder and no built-in corpus; built in: {', '.join(names)}; "
        f"a data set of the Hugging Face Hub is hf:NAME.{hint}"
    )


def _missing_path(path: Path) -> str:
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(existing).parts[0]
    nearest = difflib.get_close_matches(missing, [item.name for item in existing.iterdir()], n=1)
    hint = f" and holds {nearest[0]!r}" if nearest else ""
    return f"there is no file or folder {path}; the folder {existing} exists{hint}"


def _unique(documents: Iterable[Document]) -> list[Document]:
    distinct = DistinctTexts()
    unique = [
        (document, found) for document in documents if (found := distinct.add(document)) is not None
    ]
    distinct.report()
    return [
        replace(document, id=distinct.final_id(document.id, found)) for document, found in unique
    ]
