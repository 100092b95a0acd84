"""The beginnings of documents, for evaluations that need not read them whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.data import TokenDocument


def first_tokens(
    documents: Sequence[TokenDocument], tokens: int, tokenizer: PreTrainedTokenizerBase
) -> list[TokenDocument]:
    """Cut documents after a number of tokens; shorter ones stay as they are.

    Args:
        documents: to cut.
        tokens: kept of each.
        tokenizer: that made the tokens. It gives the text that they stand for, and with it the
            bytes and words of a document that is cut.
    """
    return [
        document if len(document.input_ids) <= tokens else _cut(document, tokens, tokenizer)
        for document in documents
    ]


def _cut(document: TokenDocument, tokens: int, tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
    ids = document.input_ids[:tokens]
    text = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list only for a batch
    return replace(
        document,
        input_ids=ids,
        n_bytes=len(text.encode("utf-8")),
        n_words=len(text.split()),
        sha256=None,
    )
