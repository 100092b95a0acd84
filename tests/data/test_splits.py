from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from memlayer.data import load_documents
from memlayer.data.splits import assign_splits
from memlayer.errors import DataError

SPLITS = ("train", "validation", "test")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"d{number}", "text": f"text {number}"}) for number in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:150]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[150:]))
    return tmp_path


def test_every_document_is_in_exactly_one_split(corpus: Path) -> None:
    ids = [item.id for name in SPLITS for item in load_documents([str(corpus)], split=name)]
    assert sorted(ids) == sorted(f"d{number}" for number in range(400))


def test_splits_have_about_their_shares() -> None:
    assigned = list(assign_splits([f"d{number}" for number in range(20_000)], seed=0).values())
    assert assigned.count("validation") / 20_000 == pytest.approx(0.05, abs=0.005)
    assert assigned.count("test") / 20_000 == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_does_not_depend_on_the_order_of_the_sources(corpus: Path, split: str) -> None:
    sources = [str(corpus / "a.jsonl"), str(corpus / "b.jsonl")]
    forward = load_documents(sources, split=split)
    backward = load_documents(sources[::-1], split=split)
    assert {item.id for item in forward} == {item.id for item in backward}


def test_documents_keep_their_split_when_others_are_added() -> None:
    few = assign_splits([f"d{number}" for number in range(300)], seed=0)
    many = assign_splits([f"d{number}" for number in range(600)], seed=0)
    assert all(many[item] == split for item, split in few.items())


def test_another_seed_gives_another_split() -> None:
    ids = [f"d{number}" for number in range(300)]
    assert assign_splits(ids, seed=0) != assign_splits(ids, seed=1)


@pytest.mark.parametrize("count", range(3, 20))
def test_small_corpora_have_every_split_and_mostly_train(count: int) -> None:
    assigned = list(assign_splits([f"d{number}" for number in range(count)], seed=0).values())
    assert assigned.count("validation") >= 1
    assert assigned.count("test") >= 1
    assert assigned.count("train") >= max(1, count - 5)


def test_a_small_corpus_says_how_it_was_split(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assign_splits(["a", "b", "c", "d"], seed=0)
    assert "4 documents are too few to split by hash alone: 2 for training, 1 for" in caplog.text


def test_two_documents_are_one_for_training_and_one_for_validation() -> None:
    assert sorted(assign_splits(["a", "b"], seed=0).values()) == ["train", "validation"]


def test_one_document_has_nothing_left_for_validation(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("Once upon a time.")
    assert len(load_documents([str(tmp_path / "novel.txt")], split="train")) == 1
    with pytest.raises(DataError) as caught:
        load_documents([str(tmp_path / "novel.txt")], split="validation")
    assert "hold 1 document(s), none of them for the validation split; give" in str(caught.value)
