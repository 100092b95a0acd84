"""A tiny model that remembers two texts, and what it reads in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import memlayer
from memlayer.inspection import inspect_prompt

if TYPE_CHECKING:
    from memlayer.backbones import Backbone
    from memlayer.inspection import Inspection
    from memlayer.model import LongMemModel

MILL = "The mill is closed. Bring the long rope, Ada. <script>boom()</script> & more. "
SHIP = "A ship came in at dawn (café), and nobody saw it leave.\n\nThe mast was gone. "
PROMPT = "The mill & the"


@pytest.fixture(scope="session")
def tiny_backbone(tiny_checkpoint: Callable[[str], Path]) -> Backbone:
    """Load a random llama with one token a byte."""
    return memlayer.load_backbone(str(tiny_checkpoint("llama")))


@pytest.fixture
def make_model(
    tiny_backbone: Backbone, as_trained: Callable[..., LongMemModel]
) -> Callable[..., LongMemModel]:
    """Wrap the backbone with a side network that reads memory strongly."""

    def make(**changes: object) -> LongMemModel:
        settings = {
            "backend": "torch",
            "segment_length": 32,
            "memory_size": 256,
            "top_k": 16,
            "chunk_size": 4,
        }
        model = memlayer.wrap(tiny_backbone.model, memlayer.LongMemConfig(**(settings | changes)))
        as_trained(model)
        with torch.no_grad():
            for gate in model.side_network.gates:
                gate.copy_(torch.linspace(-1, 1, len(gate)))
        return model.eval()

    return make


@pytest.fixture
def remember(tiny_backbone: Backbone) -> Callable[..., None]:
    """Memorize a text under a name."""

    def read(model: LongMemModel, text: str, **options: object) -> None:
        ids = tiny_backbone.tokenizer(text, return_tensors="pt").input_ids
        model.memorize(ids, **options)

    return read


@pytest.fixture
def model(make_model: Callable[..., LongMemModel], remember: Callable[..., None]) -> LongMemModel:
    """Give a model that remembers the mill and the ship."""
    made = make_model()
    remember(made, MILL, document="mill.txt")
    remember(made, SHIP, document="<b>ship</b>.txt")
    return made


@pytest.fixture
def inspection(model: LongMemModel, tiny_backbone: Backbone) -> Inspection:
    """Inspect a prompt over both texts."""
    return inspect_prompt(model, tiny_backbone.tokenizer, PROMPT)


@pytest.fixture
def texts() -> dict[str, str]:
    """Give what the model remembers, by document."""
    return {"mill.txt": MILL, "<b>ship</b>.txt": SHIP}


@pytest.fixture
def prompt() -> str:
    """Give the inspected prompt."""
    return PROMPT
