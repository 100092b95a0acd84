"""A tiny checkpoint, and a bank on disk that it can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import memlayer
from memlayer_cli.main import run

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

MILL = "The mill is closed. Bring the long rope, Ada. " * 3


@dataclass(frozen=True)
class Remembering:
    """What the commands are given."""

    backbone: Path
    checkpoint: Path
    bank: Path

    @property
    def model(self) -> list[str]:
        """Give the options that name the trained model and its bank."""
        return ["--checkpoint", str(self.checkpoint), "--bank", str(self.bank)]


@pytest.fixture(scope="session")
def remembering(
    tiny_checkpoint: Callable[[str], Path],
    as_trained: Callable[..., LongMemModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Remembering:
    """Save a side network whose memory makes a difference, and a bank. Read them only."""
    folder = tmp_path_factory.mktemp("remembering")
    backbone = memlayer.load_backbone(str(tiny_checkpoint("llama")))
    config = memlayer.LongMemConfig(
        backend="torch", segment_length=64, memory_size=256, top_k=16, chunk_size=4
    )
    model = as_trained(memlayer.wrap(backbone.model, config))
    with torch.no_grad():
        for gate in model.side_network.gates:
            gate.fill_(1.0)
    model.save_pretrained(folder / "checkpoint")
    ids = backbone.tokenizer(MILL, return_tensors="pt").input_ids
    model.memorize(ids, document="mill.txt")
    model.memory.save(folder / "bank")
    return Remembering(tiny_checkpoint("llama"), folder / "checkpoint", folder / "bank")


@pytest.fixture
def usage_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that the user got wrong, and give its one line of error."""

    def call(*arguments: object) -> str:
        capsys.readouterr()  # transformers' progress bars, from making the checkpoints
        assert run([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        assert shown.err.startswith("memlayer: error: ")
        return shown.err

    return call
