"""Every model family with every backend, through the command line from training to evaluation."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from memlayer.plugins import default_plugins
from memlayer_cli.main import run


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of texts of many segments."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"The memory of document {number}. " * 6)
    return folder


@pytest.mark.parametrize("backend", ["torch", "faiss", "hnswlib", "faiss-gpu"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_family_trains_and_evaluates_with_a_backend(
    family, backend, texts, tiny_checkpoint, tmp_path
):
    reason = default_plugins().backends.unavailable_reason(backend)
    if reason is not None:
        pytest.skip(reason)
    output, scores = tmp_path / "run", tmp_path / "scores.json"
    sizes = ["--segment-length", "16", "--memory-size", "64", "--top-k", "8"]
    train = ["train", "--backbone", str(tiny_checkpoint(family)), "--backend", backend, *sizes]
    train += ["--data", str(texts), "--output", str(output), "--steps", "3"]
    assert run([*train, "--eval-tokens", "64", "--gate-learning-rate", "0.3"]) == 0
    saved = json.loads((output / "training.json").read_text())
    assert saved["finished"]
    assert saved["memory"]["backend"] == backend
    weights = load_file(output / "adapter_model.safetensors")
    assert any(
        name.startswith("gates") and value.abs().max() > 0 for name, value in weights.items()
    )

    evaluate = ["eval", "perplexity", "--checkpoint", str(output), "--data", str(texts)]
    assert run([*evaluate, "--json", str(scores)]) == 0
    result = json.loads(scores.read_text())
    assert result["backend"] == backend
    assert result["tokens"] > 64
    assert result["perplexity"] > 1
