from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import memlayer
from memlayer_cli.main import run

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

SENTENCE = "The bank holds keys and values of tokens that were read. "
LENGTHS = {"first": 150, "second": 90, "third": 20, "fourth": 120}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    lines = [
        json.dumps({"id": name, "text": (SENTENCE * 4)[:length]})
        for name, length in LENGTHS.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make_checkpoint(
    tiny_checkpoint: Callable[[str], Path], as_trained: Callable[..., LongMemModel], tmp_path: Path
) -> Callable[..., Path]:
    """Save a side network whose memory makes a difference, for a tiny backbone."""

    def make(family: str, backend: str = "torch") -> Path:
        backbone = memlayer.load_backbone(str(tiny_checkpoint(family))).model
        config = memlayer.LongMemConfig(
            backend=backend, segment_length=32, memory_size=64, top_k=8, chunk_size=4
        )
        as_trained(memlayer.wrap(backbone, config)).save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(data: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run the command on all documents and give its JSON."""

    def call(*arguments: object) -> dict[str, Any]:
        options = ["--data", data, "--split", "all", *arguments, "--json", "-"]
        assert run(["eval", "perplexity", *map(str, options)]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def error_of(data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which the user got wrong, and give its one line of error."""

    def call(*arguments: object) -> str:
        options = ["--data", data, "--split", "all", *arguments]
        capsys.readouterr()  # transformers' progress bars, from making the checkpoints
        assert run(["eval", "perplexity", *map(str, options)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        return shown.err

    return call


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_checkpoint_is_scored_with_memory_without_and_as_a_backbone(
    family: str, make_checkpoint: Callable[..., Path], evaluate: Evaluate
) -> None:
    found = evaluate("--checkpoint", make_checkpoint(family))
    # The tiny tokenizer has one token a byte; a document's first token is not scored.
    assert found["tokens"] == sum(LENGTHS.values()) - 4
    assert (found["memory_tokens"], found["backend"]) == (64, "torch")
    assert list(found["conditions"]) == ["backbone", "no_memory", "memory_64"]
    assert found["perplexity"] == found["conditions"]["memory_64"]["perplexity"]
    perplexities = {score["perplexity"] for score in found["conditions"].values()}
    assert len(perplexities) == 3
    assert found["seconds"] > 0
    assert [score["id"] for score in found["per_document"]] == list(LENGTHS)
    assert found["conditions"]["backbone"]["bits_per_byte"] == pytest.approx(
        found["conditions"]["backbone"]["loss"] / torch.tensor(2.0).log().item() * 376 / 380
    )


def test_scored_tokens_and_backbone_are_the_same_whatever_the_memory(
    make_checkpoint: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    evaluate: Evaluate,
) -> None:
    checkpoint = make_checkpoint("llama")
    results = [
        evaluate("--checkpoint", checkpoint),
        evaluate("--checkpoint", checkpoint, "--no-memory"),
        evaluate("--checkpoint", checkpoint, "--memory-size", 16, "--memory-size", 1024),
        evaluate("--backbone", tiny_checkpoint("llama"), "--segment-length", 32),
    ]
    assert {found["tokens"] for found in results} == {376}
    assert [found["memory_tokens"] for found in results] == [64, 0, 1024, 0]
    assert len({tuple(found) for found in results}) == 1
    backbones = [found["conditions"]["backbone"]["perplexity"] for found in results]
    assert backbones == pytest.approx([backbones[0]] * 4)
    assert results[3]["perplexity"] == results[3]["conditions"]["backbone"]["perplexity"]
    assert list(results[2]["conditions"]) == ["backbone", "no_memory", "memory_16", "memory_1024"]


def test_stride_and_dense_context_are_reported_beside_fresh_segments(
    make_checkpoint: Callable[..., Path], evaluate: Evaluate
) -> None:
    checkpoint = make_checkpoint("llama")
    found = evaluate("--checkpoint", checkpoint, "--stride", 16, "--dense-context", 128)
    assert (found["stride"], found["fresh"]["stride"]) == (16, 32)
    assert found["conditions"]["dense"] == found["fresh"]["conditions"]["dense"]
    fresh = evaluate("--checkpoint", checkpoint)
    assert fresh["perplexity"] == found["fresh"]["conditions"]["memory_64"]["perplexity"]
    assert evaluate("--checkpoint", checkpoint, "--stride", 16, "--no-fresh")["fresh"] is None


def test_the_beginning_of_some_documents_can_be_asked_for(
    make_checkpoint: Callable[..., Path], evaluate: Evaluate
) -> None:
    checkpoint = make_checkpoint("gpt2")
    found = evaluate("--checkpoint", checkpoint, "--max-documents", 3, "--max-tokens", 100)
    scores = [(item["id"], item["tokens"], item["bytes"]) for item in found["per_document"]]
    assert scores == [("first", 99, 100), ("second", 89, 90), ("third", 19, 20)]
    assert (found["settings"]["max_documents"], found["settings"]["max_tokens"]) == (3, 100)


@pytest.mark.parametrize("backend", ["faiss", "hnswlib"])
def test_the_backend_can_be_another_than_the_checkpoints(
    backend: str, make_checkpoint: Callable[..., Path], evaluate: Evaluate
) -> None:
    pytest.importorskip(backend)
    checkpoint = make_checkpoint("opt")
    exact = evaluate("--checkpoint", checkpoint)
    other = evaluate("--checkpoint", checkpoint, "--backend", backend)
    assert other["backend"] == backend
    # 16 chunks are few enough for a graph to find the best ones too.
    assert other["perplexity"] == pytest.approx(exact["perplexity"], rel=1e-4)


def test_the_tables_name_conditions_intervals_and_places(
    make_checkpoint: Callable[..., Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint("llama")
    arguments = ["--data", str(data), "--split", "all", "--stride", "16", "--json"]
    file = data.with_name("result.json")
    command = ["eval", "perplexity", "--checkpoint", str(checkpoint), *arguments, str(file)]
    assert run(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads(file.read_text(encoding="utf-8"))
    assert "windows every 16 tokens of 32, 376 tokens scored" in shown
    assert "fresh segments of 32, 376 tokens scored" in shown
    assert f"{found['perplexity']:.3f}" in shown
    assert "memory_64: change of perplexity" in shown
    assert "4 documents, Student's t" in shown
    assert "perplexity by the tokens of local context" in shown
    assert "note: memory is never read in 1 of 4 documents" in shown


def test_exactly_one_of_checkpoint_and_backbone_is_wanted(error_of: Callable[..., str]) -> None:
    assert "give either --checkpoint or --backbone" in error_of()
    assert "give either --checkpoint or --backbone" in error_of(
        "--checkpoint", "a", "--backbone", "b"
    )


def test_options_that_contradict_each_other_are_refused(
    make_checkpoint: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    error_of: Callable[..., str],
) -> None:
    checkpoint = make_checkpoint("llama")
    assert "--no-memory and --memory-size exclude each other" in error_of(
        "--checkpoint", checkpoint, "--no-memory", "--memory-size", 64
    )
    assert "stride must be at most segment_length=32, got 64" in error_of(
        "--checkpoint", checkpoint, "--stride", 64
    )
    assert "backend 'torch' has no memory to search without a checkpoint" in error_of(
        "--backbone", tiny_checkpoint("llama"), "--backend", "torch"
    )
    assert "memory_sizes need a model with a side network, got [64]" in error_of(
        "--backbone", tiny_checkpoint("llama"), "--memory-size", 64
    )
    assert "segment_length must be at most 128, the learned positions" in error_of(
        "--backbone", tiny_checkpoint("gpt2")
    )
    assert "dtype must be one of" in error_of(
        "--backbone", tiny_checkpoint("gpt2"), "--dtype", "int8"
    )


def test_a_directory_without_a_checkpoint_is_named(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    assert f"there is no checkpoint in {tmp_path}" in error_of("--checkpoint", tmp_path)


def test_a_tampered_checkpoint_is_refused(
    make_checkpoint: Callable[..., Path], error_of: Callable[..., str]
) -> None:
    checkpoint = make_checkpoint("llama")
    path = checkpoint / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    assert "does not match its checksum" in error_of("--checkpoint", checkpoint)


def test_a_document_of_one_token_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, error_of: Callable[..., str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x", encoding="utf-8")
    assert "document 'short.txt' has 1 tokens; at least 2 are needed" in error_of(
        "--backbone", tiny_checkpoint("llama"), "--data", short
    )
