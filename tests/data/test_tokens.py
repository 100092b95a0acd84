from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memlayer.data import Document, count_tokens, load_documents, tokenize_documents

if TYPE_CHECKING:
    from memlayer.backbones import Backbone


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"), model_max_length=16)


def test_tokens_decode_to_the_text_without_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "One line,\n\tanother with ünïcode.\n"
    (document,) = tokenize_documents([Document("a", text)], tokenizer)
    assert document.input_ids.dtype == torch.int64
    assert tokenizer.decode(document.input_ids) == text
    assert not set(document.input_ids.tolist()) & set(tokenizer.all_special_ids)


def test_lengths_are_counted_in_bytes_and_words(tokenizer: PreTrainedTokenizerBase) -> None:
    (document,) = tokenize_documents([Document("a", "drei  Wörter\nhier")], tokenizer)
    assert (document.n_bytes, document.n_words) == (18, 3)


def test_long_documents_do_not_warn_about_the_models_window(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "far more than sixteen tokens " * 9
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    source = logging.getLogger("transformers")
    source.addHandler(handler)
    try:
        tokenize_documents([Document("a", text)], tokenizer)
        assert records == []
        tokenizer(text)  # the same without our care
        assert "sequence length is longer" in records[0].getMessage()
    finally:
        source.removeHandler(handler)


def test_progress_is_told_after_every_document(tokenizer: PreTrainedTokenizerBase) -> None:
    told: list[tuple[int, int]] = []
    documents = [Document("a", "one"), Document("b", "two!")]
    tokenized = tokenize_documents(
        documents, tokenizer, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 2), (2, 2)]
    assert count_tokens(tokenized) == 7


def test_smollm2_tokenises_a_novel_whole_and_without_loss(smollm2: Backbone, shared: Path) -> None:
    books = load_documents([str(shared / "data/books/books_validation.jsonl.gz")], split="all")
    book = min(books, key=lambda item: len(item.text))
    (document,) = tokenize_documents([book], smollm2.tokenizer)
    assert smollm2.tokenizer.decode(document.input_ids) == book.text
