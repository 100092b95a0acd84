"""The checkpoint that is in the repository: it loads, and memory works without training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

import memlayer

if TYPE_CHECKING:
    from memlayer.backbones import Backbone

FOLDER = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m"
TEXT = (
    "Captain Ferrier kept the keys of the Bellwether in a tin box under the third stair. Nobody "
    "but his niece Odile knew of it, and Odile had gone to Trondheim in the spring to learn the "
    "trade of a bookbinder. When the harbour froze, the crew of the Bellwether played cards."
)
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="a source archive has no checkpoints")


def test_the_card_names_the_file_that_is_there() -> None:
    weights = FOLDER / "adapter_model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert found == json.loads((FOLDER / "adapter_config.json").read_text())["sha256"]
    assert weights.stat().st_size < 45e6


@torch.no_grad()
def test_what_was_read_is_predicted_better(smollm2: Backbone) -> None:
    model = memlayer.load(FOLDER, backbone=smollm2.model)
    ids = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids
    # The name stands only in what was memorized.
    question = smollm2.tokenizer(
        "The keys were still in the tin box under the third stair. Nobody but his niece",
        return_tensors="pt",
    ).input_ids
    answer = smollm2.tokenizer(" Odile").input_ids[0]

    def loss() -> float:
        logits = model(question).logits[0, -1]
        return float(functional.cross_entropy(logits, torch.tensor(answer)))

    with model.disable_memory():
        without = loss()
    model.memorize(ids)
    assert loss() < without - 0.5
    with model.disable_adapter():
        assert torch.equal(model(question).logits, smollm2.model(question).logits)


def test_it_loads_by_its_folder_alone(smollm2: Backbone) -> None:
    model = memlayer.load(FOLDER)
    assert model.memory_config.memory_layers == (14, 16, 20, 22)
