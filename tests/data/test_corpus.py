"""A corpus on disk: the same documents as in memory, without being in memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memlayer.data import (
    StreamBatches,
    load_documents,
    prepare_corpus,
    tokenize_documents,
)
from memlayer.data.corpus import CORPUS, DOCUMENTS, TOKENS
from memlayer.errors import DataError, UnknownNameError


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"))


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Files of every kind, a text twice, and two texts under one name."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "readme.md").write_text(f"Read me, ünïcode, in {folder.name}.")
    lines = [json.dumps({"id": f"line {n}", "text": f"text number {n} " * n}) for n in range(1, 40)]
    (first / "lines.jsonl").write_text("\n".join(lines))
    with gzip.open(first / "more.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "compressed"}) + "\n")
    twice = tmp_path / "lines.jsonl"
    twice.write_text(lines[3])
    return [str(first), str(second), str(twice)]


@pytest.mark.parametrize("split", ["train", "validation", "test", "all"])
def test_it_holds_what_is_loaded_into_memory(
    split: Any, sources: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    corpus = prepare_corpus(sources, tokenizer, folder=tmp_path / "corpus").select(split, seed=3)
    loaded = tokenize_documents(load_documents(sources, split=split, seed=3), tokenizer)
    assert len(corpus) == len(loaded) > 0
    for mine, other in zip(corpus, loaded, strict=True):
        assert (mine.id, mine.n_bytes, mine.n_words) == (other.id, other.n_bytes, other.n_words)
        assert torch.equal(mine.input_ids, other.input_ids.int())
        assert mine.digest() == other.digest()
    assert [document.id for document in corpus[1:3]] == [document.id for document in loaded[1:3]]


def test_streams_give_the_same_batches(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    corpus = prepare_corpus(sources, tokenizer, folder=tmp_path / "corpus")
    loaded = tokenize_documents(load_documents(sources, split="all"), tokenizer)
    settings = {"rows": 3, "segment_length": 16}
    mine, other = StreamBatches(corpus, **settings), StreamBatches(loaded, **settings)
    batches = list(zip(mine, other, strict=True))
    assert len(batches) > 10
    for one, two in batches:
        for name in ("input_ids", "targets", "attention_mask", "ends"):
            assert torch.equal(getattr(one, name), getattr(two, name))
            assert getattr(one, name).dtype == getattr(two, name).dtype
    assert mine.state_dict() == other.state_dict()


def test_it_is_made_once_and_again_when_something_changed(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "corpus"
    told: list[int] = []

    def made(**settings: Any) -> bool:
        told.clear()
        corpus = prepare_corpus(
            sources,
            settings.pop("tokenizer", tokenizer),
            folder=folder,
            progress=told.append,
            **settings,
        )
        assert told in ([], list(range(1, len(corpus) + 1)))
        return bool(told)

    assert made()
    assert not made()
    other = AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"))
    other.add_tokens(["text number"])
    assert made(tokenizer=other)
    assert made()
    path = Path(sources[2])
    path.write_text(path.read_text() + "\n" + json.dumps({"text": "one more"}))
    assert made()
    for name in (TOKENS, DOCUMENTS, CORPUS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        assert name == CORPUS or made()
    (folder / CORPUS).write_text("{}")
    assert made()
    assert not made()


def test_wrong_sources_and_folders_leave_nothing_behind(
    sources: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "corpus"
    with pytest.raises(UnknownNameError, match="Did you mean 'python-docs'"):
        prepare_corpus(["python-doc"], tokenizer, folder=folder)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\nno JSON\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:2 is not JSON"):
        prepare_corpus([*sources, str(broken)], tokenizer, folder=folder)
    assert list(folder.parent.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "mine" / CORPUS).write_text("{}")  # somebody's own file of that name
    for place in ("mine", "mine/letter.txt"):
        with pytest.raises(DataError, match="is or holds something else than a corpus; give anoth"):
            prepare_corpus(sources, tokenizer, folder=tmp_path / place)
    assert (tmp_path / "mine" / "letter.txt").exists()
    shutil.rmtree(folder.parent)
    folder.parent.write_text("a file in the way")
    with pytest.raises(DataError, match=r"cannot keep the tokens of .* set XDG_CACHE_HOME"):
        prepare_corpus(sources, tokenizer, folder=folder)


STREAM = """
import resource, sys
from transformers import AutoTokenizer
from memlayer.data import StreamBatches, prepare_corpus

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer(["warm up " * 50000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = prepare_corpus([sys.argv[2]], tokenizer, folder=sys.argv[3])
batches = StreamBatches(corpus, rows=4, segment_length=512)
first = next(batches)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, sum(len(d.input_ids) for d in corpus), int(first.attention_mask.sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_a_corpus_is_never_in_memory_as_a_whole(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """9 MB of text, a token a byte: 71 MB as int64."""
    with (tmp_path / "long.jsonl").open("w") as file:
        for number in range(24):
            text = f"{number} a line of text. " * 20_000
            file.write(json.dumps({"text": text}) + "\n")
    arguments = [tiny_checkpoint("gpt2"), tmp_path / "long.jsonl", tmp_path / "corpus"]
    result = subprocess.run(
        [sys.executable, "-c", STREAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    grown, tokens, read = map(int, result.stdout.split())
    print(f"{grown / 1024:.0f} MiB more for {tokens:,} tokens")
    assert tokens > 8_900_000
    assert read == 4 * 512
    assert grown * 1024 < 40e6
