"""Side layers of the backbone's own weights, with low-rank updates that train (LoRA)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import memlayer
from memlayer.errors import ConfigError, UnsupportedModelError
from memlayer.low_rank import LowRankUpdate, add_updates

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LOW_RANK = memlayer.LongMemConfig(
    backend="torch",
    segment_length=16,
    memory_size=64,
    top_k=8,
    chunk_size=4,
    memory_layers=(1,),
    layer_reduction_factor=1,
    side_rank=3,
)
IDS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained(as_trained: Callable[..., LongMemModel]) -> Callable[..., LongMemModel]:
    """Wrap, and put anything but zero into the updates."""

    def make(backbone: Any, config: memlayer.LongMemConfig = LOW_RANK) -> LongMemModel:
        return as_trained(memlayer.wrap(backbone, config), by=0.05, ending=".up")

    return make


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_of_all_layers_and_without_memory_it_is_lora(
    family: str, make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel]
) -> None:
    """PEFT's own layers, given the same two matrices, give the same logits and gradients."""
    backbone = make_backbone(family)
    model = trained(backbone)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules="all-linear",
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    other = peft.get_peft_model(copy.deepcopy(backbone), settings)
    theirs = [module for module in other.modules() if hasattr(module, "lora_A")]
    ours = [module for module in model.side_network.modules() if isinstance(module, LowRankUpdate)]
    assert len(theirs) == len(ours) > 0
    with torch.no_grad():
        for mine, his in zip(ours, theirs, strict=True):
            his.lora_A["default"].weight.copy_(mine.down)
            his.lora_B["default"].weight.copy_(mine.up)
    mine, his = model(IDS, labels=IDS), other(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(mine.logits, his.logits, rtol=1e-4, atol=1e-5)
    mine.loss.backward()
    his.loss.backward()
    for update, layer in zip(ours, theirs, strict=True):
        for own, wanted in (
            (update.down, layer.lora_A["default"].weight),
            (update.up, layer.lora_B["default"].weight),
        ):
            torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", [1, 2])
def test_it_is_the_side_network_whose_matrices_have_the_updates_in_them(
    reduction: int, make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel]
) -> None:
    """Merged into full copies the updates compute the same, memory included."""
    config = replace(LOW_RANK, layer_reduction_factor=reduction)
    model = trained(make_backbone("llama"), config)
    whole = memlayer.wrap(make_backbone("llama"), replace(config, side_rank=None))
    with torch.no_grad():
        for layer, updates in zip(
            whole.side_network.layers, model.side_network.layers, strict=True
        ):
            for path, update in updates.named_modules():
                if isinstance(update, LowRankUpdate):
                    layer.get_submodule(path).weight += 2 * update.up @ update.down
        for one in (model, whole):
            one.memorize(IDS)
        torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)


def test_memory_is_written_by_the_untouched_backbone(
    make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel]
) -> None:
    found = []
    for make in (trained, memlayer.wrap):
        model = make(make_backbone("llama"), LOW_RANK)
        model.memorize(IDS)
        queries = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(2))
        found.append(model.memory.retrieve(queries, layer=0))
    for name in ("ids", "scores", "keys", "values"):
        torch.testing.assert_close(
            getattr(found[0], name), getattr(found[1], name), rtol=0.0, atol=0.0
        )


def test_only_updates_norm_and_gates_are_trained_and_saved(
    make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel], tmp_path: Path
) -> None:
    backbone = make_backbone("llama")
    model = trained(backbone)
    model.memorize(IDS)
    linear = [module for module in backbone.model.layers.modules() if isinstance(module, nn.Linear)]
    weights = sum(3 * (module.in_features + module.out_features) for module in linear)
    weights += backbone.config.hidden_size + backbone.config.num_attention_heads
    assert sum(weight.numel() for weight in model.trainable_parameters()) == weights
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
    assert sum(value.numel() for value in saved.values()) == weights
    again = memlayer.load(tmp_path, backbone=make_backbone("llama"))
    again.memorize(IDS)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.trainable_parameters():
            weight.zero_()
        assert not torch.allclose(twin(IDS).logits, model(IDS).logits, atol=1e-3)
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_with_gradient_checkpointing_the_gradients_are_the_same(
    make_backbone: Callable[..., Any],
    trained: Callable[..., LongMemModel],
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = trained(make_backbone("llama"))
        model.memorize(IDS)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([weight.grad for weight in model.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_it_starts_alike_every_time_and_draws_no_random_number(
    make_backbone: Callable[..., Any],
) -> None:
    """Each process of a run wraps for itself."""
    backbone = make_backbone("llama")
    before = torch.get_rng_state()
    first = memlayer.wrap(backbone, LOW_RANK).side_network.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(before.sum().item())
    second = memlayer.wrap(backbone, LOW_RANK).side_network.state_dict()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    down = [weight for name, weight in first.items() if name.endswith("q_proj.down")]
    assert not torch.equal(down[0], down[1])


def test_it_trains_in_a_coupled_layer_alone(
    make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel]
) -> None:
    backbone = make_backbone("llama")
    model = trained(backbone, replace(LOW_RANK, coupled=True))
    assert len(model.side_network.layers) == 1
    model.memorize(IDS)
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in model.trainable_parameters())


def test_an_adapter_in_the_backbone_is_one_map_with_its_own(
    make_backbone: Callable[..., Any],
) -> None:
    settings = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(make_backbone("llama"), settings).eval()
    with torch.no_grad():
        own = adapted(input_ids=IDS).logits
        model = memlayer.wrap(adapted, LOW_RANK)
        assert torch.equal(model(IDS).logits, own)
    assert set(model.side_network.state_dict()) == set(
        memlayer.wrap(make_backbone("llama"), LOW_RANK).side_network.state_dict()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_updates_are_wide_beside_a_narrow_backbone(
    dtype: torch.dtype, make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel]
) -> None:
    model = trained(make_backbone("llama").to(dtype))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert {weight.dtype for weight in model.side_network.layers.parameters()} == {wide}
    model.memorize(IDS)
    output = model(IDS, labels=IDS)
    output.loss.backward()
    assert output.logits.dtype == dtype


def test_compiled_it_computes_the_same(
    make_backbone: Callable[..., Any], trained: Callable[..., LongMemModel]
) -> None:
    with torch.no_grad():
        model = trained(make_backbone("llama"))
        model.memorize(IDS)
        expected = model(IDS).logits
        model.compile(backend="aot_eager")
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="side_rank needs side_init=\"replace\", got 'identity'"):
        replace(LOW_RANK, side_init="identity")
    with pytest.raises(ConfigError, match="side_rank must be at least 1, got 0"):
        replace(LOW_RANK, side_rank=0)
    with pytest.raises(ConfigError, match=r"side_rank must be a whole number, got 1\.5"):
        replace(LOW_RANK, side_rank=1.5)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="linear maps in LayerNorm, which has none"):
        add_updates(nn.LayerNorm(4), 2, seed=0)
