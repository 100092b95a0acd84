from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import memlayer


@pytest.fixture
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "books.py"
    spec = importlib.util.spec_from_file_location("books_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def books(tmp_path: Path) -> Path:
    choose = random.Random(0)
    words = ["harbour", "captain", "letter", "winter", "lantern", "garden", "river", "stranger"]
    for split, count in (("train", 3), ("validation", 2)):
        with gzip.open(tmp_path / f"books_{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number in range(count):
                text = " ".join(choose.choice(words) for _ in range(60))
                file.write(json.dumps({"id": f"{split}{number}", "text": text}) + "\n")
    return tmp_path


def test_a_run_trains_and_its_numbers_are_those_of_the_checkpoint_it_leaves(
    benchmark: ModuleType,
    books: Path,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("accelerate")
    output = books / "run"
    options = {
        "--books": books,
        "--output": output,
        "--backbone": tiny_checkpoint("llama"),
        "--steps": 3,
        "--segment-length": 16,
        "--stride": 8,
        "--memory-layers": 2,
        "--memory-size": 64,
        "--memory-sizes": 64,
        "--top-k": 8,
        "--dense-context": 64,
        "--dense-stride": 32,
        "--tokens": 100,
        "--train-eval-tokens": 64,
    }
    words = [str(word) for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["books.py", *words, "--control"])
    benchmark.main()

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert list(results["evaluation"]) == ["memory", "control"]
    assert results["training"]["memory"]["steps"] == 3
    found = results["evaluation"]["memory"]
    assert found["tokens"] == 2 * 99
    assert list(found["conditions"]) == ["backbone", "no_memory", "memory_64", "dense"]
    assert list(results["evaluation"]["control"]["conditions"]) == ["backbone", "no_memory"]
    for name in ("memory", "control"):
        assert memlayer.load(output / name).memory_config.memory_layers == (2,)
    shown = capsys.readouterr().out
    assert shown == (output / "results.md").read_text(encoding="utf-8") + "\n"
    assert f"{found['perplexity']:.4f}" in shown

    # What is trained already is not trained again.
    monkeypatch.setattr(benchmark, "train", None)
    monkeypatch.setattr(sys, "argv", ["books.py", *words, "--control", "--resume"])
    benchmark.main()
    again = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert again["training"] == results["training"]
    assert again["evaluation"]["memory"]["perplexity"] == found["perplexity"]
