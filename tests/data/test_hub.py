from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from memlayer.data import load_documents, prepare_corpus
from memlayer.errors import DataError

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def write(path: Path, *texts: str, field: str = "text") -> None:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def test_a_data_set_with_its_own_splits_keeps_them(folder: Path) -> None:
    for name in ("train", "validation", "test"):
        write(folder / f"{name}.jsonl", f"{name} 0", f"{name} 1")
    for split in ("train", "validation", "test"):
        texts = [item.text for item in load_documents([f"hf:{folder}"], split=split)]
        assert texts == [f"{split} 0", f"{split} 1"]


def test_a_data_set_with_a_train_part_only_is_split_by_hash(folder: Path) -> None:
    write(folder / "train.jsonl", *(f"text {number}" for number in range(30)))
    train = load_documents([f"hf:{folder}"], split="train")
    validation = load_documents([f"hf:{folder}"], split="validation")
    assert train
    assert validation
    assert len(load_documents([f"hf:{folder}"], split="all")) == 30
    assert not {item.id for item in train} & {item.id for item in validation}


def test_a_corpus_on_disk_is_made_of_it_and_again_when_its_files_change(
    folder: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"))
    for name in ("train", "validation"):
        write(folder / f"{name}.jsonl", *(f"{name} {number}" for number in range(5)))
    place = tmp_path / "corpus"
    for changed in (False, True):
        if changed:
            write(folder / "train.jsonl", "something else")
        corpus = prepare_corpus([f"hf:{folder}"], tokenizer, folder=place)
        for split in ("train", "validation"):
            loaded = load_documents([f"hf:{folder}"], split=split)
            chosen = corpus.select(split)
            assert [item.id for item in chosen] == [item.id for item in loaded]
            assert [tokenizer.decode(item.input_ids) for item in chosen] == [
                item.text for item in loaded
            ]


def test_a_data_set_without_the_column_is_named_with_those_it_has(folder: Path) -> None:
    write(folder / "train.jsonl", "one", field="body")
    with pytest.raises(DataError, match=r"has no field 'text', only body; name the text's field"):
        load_documents([f"hf:{folder}"], split="all")


def test_a_folder_that_is_no_data_set_is_named(folder: Path) -> None:
    (folder / "image.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"cannot load data set '.*set' \(") as caught:
        load_documents([f"hf:{folder}"], split="all")
    assert "\n" not in str(caught.value)


def test_without_network_a_data_set_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_documents(["hf:somebody/novels"], split="all")
    assert time.monotonic() - start < 10
    assert "cannot load data set 'somebody/novels' from the Hugging Face Hub (offline?" in str(
        caught.value
    )
    assert "give a local folder or file" in str(caught.value)


@pytest.mark.network
def test_a_data_set_of_the_hub_loads() -> None:
    assert load_documents(["hf:Salesforce/wikitext:wikitext-2-raw-v1"], split="validation")
