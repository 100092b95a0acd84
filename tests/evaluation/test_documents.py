from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import memlayer
from memlayer.data import Document, TokenDocument, tokenize_documents
from memlayer.evaluation import first_tokens


@pytest.fixture
def tokenizer(tiny_checkpoint: Callable[[str], Path]):
    return memlayer.load_backbone(str(tiny_checkpoint("llama"))).tokenizer


def test_a_document_that_is_cut_keeps_the_bytes_and_words_of_what_is_left(tokenizer) -> None:
    # The tiny tokenizer has one token a byte; é has two.
    document = Document(id="a", text="un café noir")
    expected = tokenize_documents([Document(id="a", text="un café")], tokenizer)[0]
    (cut,) = first_tokens(tokenize_documents([document], tokenizer), 8, tokenizer)
    torch.testing.assert_close(cut.input_ids, expected.input_ids)
    assert (cut.id, cut.n_bytes, cut.n_words) == ("a", 8, 2)
    assert (expected.n_bytes, expected.n_words) == (8, 2)


def test_a_document_no_longer_than_that_stays_as_it_is(tokenizer) -> None:
    documents = tokenize_documents([Document(id="a", text="four")], tokenizer)
    kept: list[TokenDocument] = first_tokens(documents, 4, tokenizer)
    assert kept[0] is documents[0]
