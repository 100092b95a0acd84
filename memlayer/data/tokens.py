"""Documents as token ids.

A document is tokenised as one string and without special tokens: the text goes on from segment to
segment, and a BOS in front of each would tell the model otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.data.documents import Document

_GROUP_CHARACTERS = 2**18
"""Tokenized at a time, or one document: a tokenizer needs some hundred bytes a token."""

_PROBE = "The 3 naïve co-operators' café — “déjà vu”\n\tline_two();  東京 🙂"


@dataclass(frozen=True)
class TokenDocument:
    """One document's token ids, and the length of its text in two other units.

    Bytes and words make losses of models with different tokenizers comparable.

    Attributes:
        id: the document's.
        input_ids: ``(n,)``, int64, on the CPU; int32 where they lie in a file (`TokenCorpus`).
        n_bytes: length of the text in UTF-8.
        n_words: pieces of the text between white space.
        sha256: of the ids, if that is known already; see `digest`.
    """

    id: str
    input_ids: Tensor
    n_bytes: int
    n_words: int
    sha256: str | None = None

    def digest(self) -> str:
        """Give the SHA-256 of the ids as 64-bit little-endian numbers, in hexadecimal."""
        return self.sha256 or digest_of(self.input_ids)


def tokenize_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenDocument]:
    """Tokenise each document as one string, without special tokens.

    Args:
        documents: what `load_documents` gave.
        tokenizer: the backbone's.
        progress: called with documents done and documents in all, after each of them.
    """
    tokenized = []
    for done, (_, document) in enumerate(tokenize_stream(documents, tokenizer), start=1):
        tokenized.append(document)
        if progress is not None:
            progress(done, len(documents))
    return tokenized


def tokenize_stream(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, TokenDocument]]:
    """Do what `tokenize_documents` does, a few documents at a time, and give them with theirs."""
    for group in _groups(documents):
        # verbose=False: no warning that a document exceeds the model's window, as it is meant to.
        texts = [document.text for document in group]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(group, rows, strict=True):
            yield (
                document,
                TokenDocument(
                    id=document.id,
                    input_ids=torch.tensor(ids, dtype=torch.int64),
                    n_bytes=len(document.text.encode("utf-8")),
                    n_words=len(document.text.split()),
                ),
            )


def digest_of(input_ids: Tensor) -> str:
    """Give the SHA-256 of token ids as 64-bit little-endian numbers, in hexadecimal."""
    return hashlib.sha256(input_ids.numpy().astype("<i8").tobytes()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a short name for what a tokenizer does: its vocabulary, and how it cuts a sample."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    sample = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, sample]).encode()).hexdigest()[:16]


def count_tokens(documents: Sequence[TokenDocument]) -> int:
    """Count the tokens of all documents together."""
    return sum(len(document.input_ids) for document in documents)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Put short documents together: fast tokenizers work on several at once."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
