"""A memory layer inside a copy of the backbone's own layer, the others run as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import memlayer
from memlayer.compilation import is_compiled
from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

FAMILIES = ["gpt2", "opt", "llama", "mistral", "qwen3"]
COUPLED = memlayer.LongMemConfig(
    backend="torch",
    segment_length=16,
    memory_size=64,
    top_k=8,
    chunk_size=4,
    memory_layers=(1,),
    layer_reduction_factor=1,
    coupled=True,
)
IDS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(0))


def remembering(backbone: Any, config: memlayer.LongMemConfig = COUPLED) -> LongMemModel:
    model = memlayer.wrap(backbone, config)
    model.memorize(IDS)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_untrained_it_is_a_side_network_of_copies_of_all_layers(
    family: str, layers: tuple[int, ...], make_backbone: Callable[..., Any]
) -> None:
    """A twin is what a copy is before it has trained, so both read memory to the same end."""
    config = replace(COUPLED, memory_layers=layers)
    coupled = remembering(make_backbone(family), config)
    beside = remembering(make_backbone(family), replace(config, coupled=False))
    first, second = coupled(IDS, labels=IDS), beside(IDS, labels=IDS)
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-4, atol=1e-4)
    first.loss.backward()
    second.loss.backward()
    for mine, other in zip(coupled.side_network.gates, beside.side_network.gates, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_only_what_reads_memory_is_trained_and_saved(
    make_backbone: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = make_backbone("llama")
    model = remembering(backbone)
    side = model.side_network
    layer = backbone.model.layers[1]
    weights = sum(weight.numel() for weight in layer.parameters())
    assert sum(w.numel() for w in model.trainable_parameters()) == weights + len(side.gates[0])
    for number, twin in enumerate(side.in_order[1:], start=2):
        source = backbone.model.layers[number]
        assert twin.self_attn.q_proj.weight is source.self_attn.q_proj.weight
        assert twin.self_attn.layer_idx == 4 + number - 1
        assert source.self_attn.layer_idx == number
        assert twin.self_attn._forward_hooks is not source.self_attn._forward_hooks
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in model.trainable_parameters())
    optimizer.step()
    model.eval()
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == weights + len(side.gates[0])
    again = memlayer.load(tmp_path, backbone=make_backbone("llama"))
    again.memorize(IDS)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_twin_follows_its_layer_to_another_precision(
    dtype: torch.dtype, make_backbone: Callable[..., Any]
) -> None:
    backbone = make_backbone("llama")
    with torch.no_grad():
        own = backbone.to(dtype)(IDS).logits
        model = memlayer.wrap(backbone, COUPLED)
        side = next(model.trainable_parameters()).dtype
        assert side == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert {weight.dtype for weight in backbone.parameters()} == {dtype}
        assert torch.allclose(model(IDS).logits, own, atol=0.1 if dtype is torch.bfloat16 else 1e-9)
        if dtype is torch.bfloat16:
            model = model.double()
            assert model.side_network.in_order[-1].mlp.up_proj.weight.dtype == torch.float64
            assert torch.allclose(model(IDS).logits, backbone(IDS).logits, atol=1e-9)


def test_what_does_not_go_with_it_is_refused() -> None:
    for wrong in ({"layer_reduction_factor": 2}, {"side_init": "identity"}):
        with pytest.raises(ConfigError, match='coupled needs side_init="replace" and layer_reduct'):
            replace(COUPLED, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="coupled must be True or False, got 1"):
        replace(COUPLED, coupled=1)  # type: ignore[arg-type]


def test_compiled_it_reads_memory_in_every_layer_that_does(
    make_backbone: Callable[..., Any],
) -> None:
    config = replace(COUPLED, memory_layers=(0, 2))
    with torch.no_grad():
        expected = remembering(make_backbone("llama"), config)(IDS).logits
        model = remembering(make_backbone("llama"), config)
        model.compile(backend="aot_eager")
        compiled = [is_compiled(layer) for layer in model.side_network.in_order]
        assert compiled == [False, True, False, True]
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
