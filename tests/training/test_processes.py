"""Training in two real processes: the same run as in one."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memlayer
from memlayer.training import read_log

SCRIPT = Path(__file__).with_name("launched.py")
SHARED = {
    "ddp": ["--multi_gpu"],
    "fsdp1": ["--use_fsdp", "--fsdp_version", "1"],
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2"],
}


def launch(
    how: str, *arguments: object, program: Sequence[str] = (str(SCRIPT),), cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in one process, or in two that accelerate starts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable]
    if how != "one":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "accelerate.commands.launch", *SHARED[how], "--num_processes", "2"]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(port)]
    command += [*program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def check(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def backbone(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def one(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    check(launch("one", backbone, output))
    return output


def values(run: Path, name: str) -> list[float]:
    return [entry[name] for entry in read_log(run) if name in entry]


@pytest.mark.parametrize(("how", "tolerance"), [("ddp", 1e-5), ("fsdp2", 1e-4)])
def test_two_processes_train_as_one_does_also_when_killed_and_resumed(
    how: str, tolerance: float, backbone: Path, one: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = launch(how, backbone, whole)
    check(result)
    held = re.findall(r"holds (\d+) of (\d+) weights", result.stdout)
    part = 0.5 if how == "fsdp2" else 1.0
    assert len(held) == 2
    assert all(int(here) / int(every) == pytest.approx(part, abs=0.05) for here, every in held)
    assert len(values(one, "loss")) == len(values(whole, "loss")) == 50
    differences = [
        abs(a - b) for a, b in zip(values(one, "loss"), values(whole, "loss"), strict=True)
    ]
    print(f"{how}: largest difference of a loss {max(differences):.2g}")
    assert max(differences) < tolerance
    for name in ("memory_tokens", "tokens"):
        assert values(one, name) == values(whole, name)
    for name in ("gradient_norm", "perplexity_memory_on", "perplexity_memory_off"):
        assert values(whole, name) == pytest.approx(values(one, name), rel=1e-4)

    step = random.SystemRandom().randrange(11, 49)
    print(f"killed after step {step}, resumed with gradient checkpointing")
    assert launch(how, backbone, killed, "--kill-after", step).returncode != 0
    # One process writes the log, and the other one's death may be faster.
    assert step - 1 <= values(killed, "step")[-1] <= step
    kept = sorted((killed / "checkpoints").glob("step-*"))[-1]
    names = {path.name for path in kept.iterdir()}
    assert {"memory-0", "memory-1", "random-0.safetensors", "random-1.safetensors"} < names
    if how == "ddp":
        refused = launch("one", backbone, killed)
        assert refused.returncode != 0
        assert "processes was 2 when this run began, got 1" in refused.stderr
    # That may change on a resume, and changes no number.
    check(launch(how, backbone, killed, "--gradient-checkpointing"))
    assert values(killed, "loss") == values(whole, "loss")
    weights, again = (load_file(run / "adapter_model.safetensors") for run in (whole, killed))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    own = load_file(one / "adapter_model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, own[name], rtol=0, atol=1e-3)
    memlayer.load(whole, backbone=memlayer.load_backbone(str(backbone)).model)
    assert json.loads((whole / "training.json").read_text())["machine"] == {"processes": 2}


def test_low_rank_updates_train_alike_in_two_processes_that_hold_them_whole(
    backbone: Path, tmp_path: Path
) -> None:
    for how in ("one", "ddp"):
        # Segments that overlap and excerpts, too: each process says which tokens of its rows are
        # new, and fills the memories of those rows that begin an excerpt.
        options = ("--side-rank", 2, "--stride", 10, "--lead", 60)
        check(launch(how, backbone, tmp_path / how, *options))
    for name in ("memory_tokens", "tokens"):
        assert values(tmp_path / "one", name) == values(tmp_path / "ddp", name)
    expected, found = values(tmp_path / "one", "loss"), values(tmp_path / "ddp", "loss")
    assert len(expected) == 50
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, abs=1e-5)
    refused = launch("fsdp2", backbone, tmp_path / "fsdp2", "--side-rank", 2)
    assert refused.returncode != 0
    message = "(coupled, side_rank) are trained under DDP, got FSDP 2; launch it with --multi_gpu"
    assert message in refused.stderr
    refused = launch("fsdp2", backbone, tmp_path / "fsdp2", "--lead", 60)
    assert refused.returncode != 0
    message = "lead_tokens=60 needs the whole model in every process"
    assert message in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_compiled_layers_train_alike_and_one_process_reports(
    how: str, backbone: Path, one: Path, tmp_path: Path
) -> None:
    check(launch(how, backbone, tmp_path / "run", "--compile", "--report-to", "tensorboard"))
    expected, found = values(one, "loss"), values(tmp_path / "run", "loss")
    differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    print(f"{how}, compiled: largest difference of a loss {max(differences):.2g}")
    assert max(differences) < 1e-5
    # The scalars' file, and that of the settings.
    assert len(list((tmp_path / "run" / "memlayer").rglob("events.*"))) == 2


def test_rows_that_cannot_be_shared_out_are_refused(backbone: Path, tmp_path: Path) -> None:
    result = launch("ddp", backbone, tmp_path / "run", "--rows", 3)
    assert result.returncode != 0
    message = "batch_size must be a multiple of the 2 processes that share its rows, got 3"
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_older_fsdp_and_one_device_for_all_are_refused(backbone: Path, tmp_path: Path) -> None:
    result = launch("fsdp1", backbone, tmp_path / "run")
    assert result.returncode != 0
    assert "sharded training is FSDP 2, got version 1" in result.stderr
    options = ["train", "--backbone", backbone, "--output", tmp_path / "run", "--device", "cpu:0"]
    result = launch("ddp", *options, "--data", SCRIPT, program=["-m", "memlayer_cli"])
    assert result.returncode != 0
    message = "device must be one of several alike, such as cuda or cpu, for 2 processes, got cpu:0"
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_trains_in_two_processes_and_one_of_them_speaks(
    backbone: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a chunk of memory, a layer, a gate. " * 8)
    options = ["train", "--backbone", backbone, "--output", tmp_path / "run", "--batch-size", "2"]
    options += ["--data", text, "--validation-data", text, "--steps", "2", "--device", "cpu"]
    options += ["--segment-length", "16", "--memory-size", "64", "--top-k", "8"]
    options += ["--eval-tokens", "64", "--backend", "torch"]
    result = launch("ddp", *options, program=["-m", "memlayer_cli"], cache=tmp_path / "cache")
    check(result)
    # One of them has tokenized, for both: the text and the validation text are the same file.
    assert len(list((tmp_path / "cache" / "memlayer" / "tokens").iterdir())) == 1
    assert result.stdout.count(f"checkpoint: {tmp_path / 'run'}") == 1
    assert values(tmp_path / "run", "step")[-1] == 2
