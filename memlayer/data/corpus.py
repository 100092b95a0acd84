"""A corpus as token ids on disk, so that it need not fit in memory.

    sources ─► one document at a time ─► tokenizer ─► FOLDER/tokens.bin       ids, int32, end to end
                                                   ├► FOLDER/documents.jsonl  one line a document
                                                   └► FOLDER/corpus.json      what it was made of

`prepare_corpus` makes it, once, and opens it; the ids are mapped from the file and read where a
stream stands. Neither a text nor its ids are in memory longer than it takes to write them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from memlayer.cache import user_cache, whole_folder
from memlayer.data.builtin import BUILTIN_CORPORA
from memlayer.data.documents import DistinctTexts, Document, Split
from memlayer.data.sources import iterate_documents
from memlayer.data.splits import select_split
from memlayer.data.tokens import TokenDocument, digest_of, tokenize_stream, tokenizer_fingerprint
from memlayer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
TOKENS, DOCUMENTS, CORPUS = "tokens.bin", "documents.jsonl", "corpus.json"


@dataclass(frozen=True)
class CorpusEntry:
    """A document of a corpus, without its ids.

    Attributes:
        id: the document's.
        start: of its ids among those of all documents.
        length: tokens.
        n_bytes: length of the text in UTF-8.
        n_words: pieces of the text between white space.
        sha256: of its ids.
        split: the split that its data set puts it in, or None.
    """

    id: str
    start: int
    length: int
    n_bytes: int
    n_words: int
    sha256: str
    split: Split | None


class TokenCorpus(Sequence[TokenDocument]):
    """Documents whose ids lie in a file; each is made when it is asked for.

    Args:
        entries: of the documents.
        tokens: ``(n,)``, int32, mapped from a file.
    """

    def __init__(self, entries: Sequence[CorpusEntry], tokens: torch.Tensor) -> None:
        self.entries = entries
        self._tokens = tokens

    def __len__(self) -> int:
        """Count the documents."""
        return len(self.entries)

    @overload
    def __getitem__(self, item: int) -> TokenDocument: ...

    @overload
    def __getitem__(self, item: slice) -> TokenCorpus: ...

    def __getitem__(self, item: int | slice) -> TokenDocument | TokenCorpus:
        """Give a document, its ids int32 where they lie in the file; or a part of the corpus."""
        if isinstance(item, slice):
            return TokenCorpus(self.entries[item], self._tokens)
        entry = self.entries[item]
        return TokenDocument(
            id=entry.id,
            input_ids=self._tokens[entry.start : entry.start + entry.length],
            n_bytes=entry.n_bytes,
            n_words=entry.n_words,
            sha256=entry.sha256,
        )

    def select(self, split: Split, *, seed: int = 0) -> TokenCorpus:
        """Give the documents of one split, as `load_documents` would.

        Raises:
            DataError: if there are none.
        """
        return TokenCorpus(select_split(self.entries, split=split, seed=seed), self._tokens)


def prepare_corpus(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: str | Path | None = None,
    text_field: str = "text",
    progress: Callable[[int], None] | None = None,
) -> TokenCorpus:
    """Tokenize every source into a folder, unless that is done already, and open it.

    It is done again when sources, tokenizer or ``text_field`` are others, or a local file's size or
    time of change; a data set of the Hub is taken to be the same under the same name.

    Args:
        sources: what `load_documents` takes.
        tokenizer: the backbone's.
        folder: where; in the user's cache, under a name of its own, if None.
        text_field: field or column that holds the text.
        progress: called with the documents done, now and then.

    Raises:
        DataError: if a source cannot be used as text, or the folder not be written.
        UnknownNameError: if a source is neither a path nor a corpus.
    """
    made_of = _made_of(sources, tokenizer, text_field)
    if folder is None:
        name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        place = user_cache() / "tokens" / name
    else:
        place = Path(folder)
    found = _open(place, made_of)
    if found is not None:
        return found
    if place.exists() and (
        not place.is_dir()
        or any(path.name not in (TOKENS, DOCUMENTS, CORPUS) for path in place.iterdir())
    ):
        raise DataError(f"{place} is or holds something else than a corpus; give another folder")
    documents = iterate_documents(sources, text_field=text_field)
    try:
        if place.exists():
            shutil.rmtree(place)
        with whole_folder(place) as partial:
            _write(partial, documents, tokenizer, made_of, progress)
    except OSError as error:
        raise DataError(
            f"cannot keep the tokens of {', '.join(sources)} in {place} ({error}); make room, or "
            "set XDG_CACHE_HOME to another folder"
        ) from error
    found = _open(place, made_of)
    if found is None:
        raise DataError(f"{place} changed while it was written; give another folder")
    return found


def _write(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    made_of: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    distinct = DistinctTexts()
    entries: list[CorpusEntry] = []
    hashes: list[str] = []
    start = 0

    def fresh() -> Iterator[Document]:
        for document in documents:
            found = distinct.add(document)
            if found is not None:
                hashes.append(found)
                yield document

    with (folder / TOKENS).open("wb") as file:
        for document, tokens in tokenize_stream(fresh(), tokenizer):
            file.write(tokens.input_ids.numpy().astype("<i4").tobytes())
            entries.append(
                CorpusEntry(
                    id=document.id,
                    start=start,
                    length=len(tokens.input_ids),
                    n_bytes=tokens.n_bytes,
                    n_words=tokens.n_words,
                    sha256=digest_of(tokens.input_ids),
                    split=document.split,
                )
            )
            start += len(tokens.input_ids)
            if progress is not None:
                progress(len(entries))
    distinct.report()
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as lines:
        for entry, found in zip(entries, hashes, strict=True):
            named = {**asdict(entry), "id": distinct.final_id(entry.id, found)}
            lines.write(json.dumps(named, ensure_ascii=False) + "\n")
    about = {
        "format_version": FORMAT_VERSION,
        "documents": len(entries),
        "tokens": start,
        "made_of": made_of,
    }
    (folder / CORPUS).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path, made_of: dict[str, Any]) -> TokenCorpus | None:
    """Give the corpus in a folder, or None where there is none that was made of this."""
    try:
        about = json.loads((folder / CORPUS).read_text(encoding="utf-8"))
        if about["format_version"] != FORMAT_VERSION or about["made_of"] != made_of:
            return None
        with (folder / DOCUMENTS).open(encoding="utf-8") as lines:
            entries = [CorpusEntry(**json.loads(line)) for line in lines]
        size = (folder / TOKENS).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(entries) != about["documents"] or size != 4 * about["tokens"]:
        return None
    if sys.byteorder != "little":
        raise DataError("a corpus on disk is little-endian, and this machine is not")
    tokens = torch.from_file(
        str(folder / TOKENS), shared=False, size=about["tokens"], dtype=torch.int32
    )
    return TokenCorpus(entries, tokens)


def _made_of(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, text_field: str
) -> dict[str, Any]:
    return {
        "sources": [_identity(source) for source in sources],
        "text_field": text_field,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def _identity(source: str) -> list[Any]:
    """Say what a source is, so that another content is another identity."""
    if source in BUILTIN_CORPORA:
        return [source, sys.version]
    if source.startswith("hf:"):
        path = Path(source.removeprefix("hf:").partition(":")[0])
        return [source, *(_files(path) if path.is_dir() else [])]
    path = Path(source)
    return [str(path.resolve()), *_files(path)]


def _files(path: Path) -> Iterator[list[Any]]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            about = file.stat()
            yield [str(file.relative_to(path)), about.st_size, about.st_mtime_ns]
