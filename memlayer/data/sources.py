"""From the sources that a user names to the documents of one split.

A source is a file, a folder, ``hf:NAME[:CONFIG]``, or the name of a built-in corpus.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from memlayer.data.builtin import BUILTIN_CORPORA
from memlayer.data.documents import Document, Split
from memlayer.data.files import read_file, read_folder
from memlayer.data.hub import read_hub_dataset
from memlayer.data.splits import select_split
from memlayer.errors import ConfigError, DataError, UnknownNameError

logger = logging.getLogger(__name__)


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
    if isinstance(sources, str) or not sources:
        raise ConfigError(f"sources must be a list of at least one source, got {sources!r}")
    documents = [document for source in sources for document in _read_source(source, text_field)]
    return select_split(_unique(documents), split=split, seed=seed)


def _read_source(source: str, text_field: str) -> list[Document]:
    if source in BUILTIN_CORPORA:
        return BUILTIN_CORPORA[source]()
    if source.startswith("hf:"):
        return read_hub_dataset(source.removeprefix("hf:"), text_field)
    path = Path(source)
    if path.is_dir():
        return read_folder(path, text_field)
    if path.is_file():
        return read_file(path, path.name, text_field)
    if path.exists():
        raise DataError(f"{source} is neither a file nor a folder; give one of these")
    if len(path.parts) == 1 and not path.suffix:
        raise UnknownNameError(_unknown_corpus(source, BUILTIN_CORPORA))
    raise DataError(_missing_path(path))


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


def _unique(documents: list[Document]) -> list[Document]:
    texts: defaultdict[str, set[str]] = defaultdict(set)
    unique = []
    for document in documents:
        if document.text not in texts[document.id]:
            texts[document.id].add(document.text)
            unique.append(document)
    if len(unique) < len(documents):
        logger.warning(
            "left out %d documents that the sources give twice", len(documents) - len(unique)
        )
    return [
        document if len(texts[document.id]) == 1 else replace(document, id=_id_with_hash(document))
        for document in unique
    ]


def _id_with_hash(document: Document) -> str:
    return f"{document.id}#{hashlib.sha256(document.text.encode()).hexdigest()[:8]}"
