"""Backbones that accelerate has spread over devices, as `device_map` asks it to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import memlayer

CONFIG = memlayer.LongMemConfig(
    backend="torch",
    segment_length=16,
    memory_size=64,
    top_k=8,
    chunk_size=4,
    memory_layers=(1, 3),
)
IDS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(0))
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}


@pytest.fixture(params=["llama", "gpt2", "llama, found"])
def pair(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Any, Any]:
    """A backbone with two layers and its words on the disk, and the same in main memory."""
    family, _, how = request.param.partition(", ")
    if how:  # its parts are found by running it, as if no adapter described them
        monkeypatch.setattr("memlayer.discovery.parts.describe", lambda *_: None)
    folder = tiny_checkpoint(family)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    device_map = dict.fromkeys((name for name, _ in plain.named_modules() if name), "cpu")
    on_disk = [f"{LAYERS[family]}.1", f"{LAYERS[family]}.3"]
    device_map = {
        name: "cpu"
        for name in device_map
        if not any((other + ".").startswith(name + ".") and other != name for other in device_map)
        and not any(name.startswith(part + ".") for part in on_disk)
    } | dict.fromkeys(on_disk, "disk")
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    away = {name for name, weight in spread.named_parameters() if weight.is_meta}
    assert len(away) > 10
    assert all(name.startswith(tuple(on_disk)) for name in away)
    return spread, plain


def test_it_computes_what_it_computes_in_one_place(pair: tuple[Any, Any], tmp_path: Path) -> None:
    spread, plain = pair
    with torch.no_grad():
        own = spread(IDS).logits
    found = []
    for backbone in (spread, plain):
        model = memlayer.wrap(backbone, CONFIG)
        assert model.device.type == "cpu"
        assert not any(weight.is_meta for weight in model.side_network.parameters())
        assert not any("_hf_hook" in vars(part) for part in model.side_network.modules())
        model.memorize(IDS)
        output = model(IDS[:, :16], labels=IDS[:, :16])
        output.loss.backward()
        gates = [gate.grad for gate in model.side_network.gates]
        with torch.no_grad():
            written = model.generate(IDS[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
            with model.disable_adapter():
                assert torch.equal(model(IDS).logits, own)
        found.append((output.logits, written, model.memory.identity, *gates))
        model.save_pretrained(tmp_path / "checkpoint")
    first, second = found
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
    again = memlayer.load(tmp_path / "checkpoint", backbone=spread)
    assert again.unwrap() is spread
    assert sum(weight.is_meta for weight in spread.parameters()) > 10
    with torch.no_grad():
        assert torch.equal(spread(IDS).logits, own)


def test_training_moves_the_side_network_and_nothing_else(pair: tuple[Any, Any]) -> None:
    model = memlayer.wrap(pair[0], CONFIG).train()
    before = {name: w.detach().clone() for name, w in model.side_network.named_parameters()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model.memorize(IDS)
    model(IDS[:, :16], labels=IDS[:, :16]).loss.backward()
    optimizer.step()
    after = dict(model.side_network.named_parameters())
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) > 20
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, pair[1](IDS).logits)
