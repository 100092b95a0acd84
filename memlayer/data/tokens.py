"""Documents as token ids.

A document is tokenised as one string and without special tokens: the text goes on from segment to
segment, and a BOS in front of each would tell the model otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.data.documents import Document


@dataclass(frozen=True)
class TokenDocument:
    """One document's token ids, and the length of its text in two other units.

    Bytes and words make losses of models with different tokenizers comparable.

    Attributes:
        id: the document's.
        input_ids: ``(n,)``, int64, on the CPU.
        n_bytes: length of the text in UTF-8.
        n_words: pieces of the text between white space.
    """

    id: str
    input_ids: Tensor
    n_bytes: int
    n_words: int


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
    for done, document in enumerate(documents, start=1):
        tokenized.append(_tokenize(document, tokenizer))
        if progress is not None:
            progress(done, len(documents))
    return tokenized


def count_tokens(documents: Sequence[TokenDocument]) -> int:
    """Count the tokens of all documents together."""
    return sum(len(document.input_ids) for document in documents)


def _tokenize(document: Document, tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
    # verbose=False: no warning that the document exceeds the model's window, as it is meant to.
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return TokenDocument(
        id=document.id,
        input_ids=torch.tensor(ids, dtype=torch.int64),
        n_bytes=len(document.text.encode("utf-8")),
        n_words=len(document.text.split()),
    )
