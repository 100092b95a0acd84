"""The commands of the reference run, every condition of it, on a tiny backbone."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("peft")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONDITIONS = [
    *("memory", "control", "lora", "lora_memory"),
    *("tuned", "tuned_memory", "tuned_control"),
]
WORDS = ["harbour", "captain", "letter", "winter", "lantern", "garden", "river", "stranger"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    choose = random.Random(0)
    for domain in ("books", "technical", "code"):
        (tmp_path / "data" / domain).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            path = tmp_path / "data" / domain / f"{domain}_{split}.jsonl.gz"
            with gzip.open(path, "wt", encoding="utf-8") as file:
                for number in range(2):
                    text = " ".join(choose.choice(WORDS) for _ in range(60))
                    file.write(json.dumps({"id": f"{split}{number}", "text": text}) + "\n")
    return tmp_path / "data"


def call(name: str, *words: object) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_condition_is_trained_once_and_stands_in_the_report(
    data: Path, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    output = tmp_path / "run"
    common = ["--data", data, "--backbone", tiny_checkpoint("llama"), "--device", "cpu"]
    sizes = ["--steps", 4, "--batch-size", 2, "--segment-length", 32, "--memory-size", 128]
    layers = ["--memory-layers", 1, 2, "--reduction", 1]
    layers += ["--tuned-memory-layers", 2, "--tuned-reduction", 2]
    train = ["reference.py", *common, "--output", output, "--dtype", "fp32", *sizes, *layers]
    train += ["--top-k", 8, "--eval-tokens", 512, "--conditions", *CONDITIONS]
    call(*train)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == CONDITIONS
    steps = {condition: made["steps"] for condition, made in summary.items()}
    assert steps == dict.fromkeys(CONDITIONS[:4], 4) | dict.fromkeys(CONDITIONS[4:], 2)
    # Both ways at once have as many weights as one, but for the rounding of a rank.
    weights = {condition: made["trainable"] for condition, made in summary.items()}
    per_rank = (
        weights["lora"]
        // json.loads((output / "lora" / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    )
    both = weights["tuned"] + weights["tuned_memory"]
    assert abs(both - weights["memory"]) <= per_rank
    assert abs(weights["lora"] - weights["memory"]) <= per_rank
    assert abs(weights["lora_memory"] - weights["memory"]) <= per_rank

    report = ["reference_report.py", *common, "--run", output, "--split", "test"]
    report += ["--documents", 2, "--tokens", 129, "--segment-length", 32, "--memory-sizes", 128]
    first = call(*report)
    header = first.splitlines()[0]
    shown = [
        *("backbone", "memory off", "memory 128", "foreign memory"),
        *("trained without memory", "LoRA"),
        *("LoRA, memory off", "LoRA, memory 128", "LoRA, foreign memory", "tuned"),
        *("tuned, memory off", "tuned, memory 128", "tuned, foreign memory"),
        "tuned, trained without memory",
    ]
    assert header == "| domain | documents | tokens | " + " | ".join(shown) + " |"
    assert "| code | tuned, memory 128 | LoRA |" in first
    assert "| code | LoRA, memory 128 | LoRA |" in first
    # What is there already is neither trained nor scored again.
    before = (output / "summary.json").stat().st_mtime_ns
    assert call(*train) == ""
    assert (output / "summary.json").stat().st_mtime_ns == before
    assert call(*report) == first
    # Another size of memory, and dense context, are scored: nothing old stands in for them.
    other = [*report[:-1], 64, "--dense-context", 96, "--domains", "code"]
    second = call(*other, "--conditions", "lora", "lora_memory")
    shown = ["LoRA", "LoRA, dense", "backbone"]
    shown += ["LoRA, memory off", "LoRA, memory 64", "LoRA, foreign memory", "dense"]
    header = "| domain | documents | tokens | " + " | ".join(shown) + " |"
    assert second.splitlines()[0] == header
    assert "| code | LoRA, foreign memory | LoRA, memory off |" in second
    # Empty where dense context does not help this backbone, which knows nothing.
    for pair in ("backbone and dense", "LoRA and LoRA, dense"):
        assert re.search(rf"\| code \| LoRA, memory 64 \| {pair} \| (-?\d+ % )?\|\n", second)
    # The same, but for one condition that another run had a tenth worse.
    there = output.with_name("there")
    shutil.copytree(output / "evaluation", there / "evaluation")
    (place,) = (there / "evaluation").glob("lora_memory-code-*-m64-*.json")
    changed = json.loads(place.read_text())
    for document in changed["per_document"]:
        document["perplexity"]["no_memory"] *= 1.1
    place.write_text(json.dumps(changed))
    third = call(*other, "--conditions", "lora", "lora_memory", "--against", there)
    assert third.startswith(second.rstrip())
    (row,) = third[len(second) :].splitlines()[3:]
    assert row.startswith("| code | LoRA, memory off | ")
    assert " | -9.1 % | " in row
