"""Backbones that are quantized, in half precision, or carry somebody's adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memlayer
from memlayer.errors import UnsupportedModelError
from memlayer.plain_linear import plain_linears, unpacked

# PEFT asks transformers for what will be renamed, and torchao torch.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CONFIG = memlayer.LongMemConfig(
    backend="torch", segment_length=16, memory_size=64, top_k=8, chunk_size=4
)


def plain(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype).eval()


def in_bfloat16() -> Any:
    return plain(torch.bfloat16)


def with_adapter() -> Any:
    adapter = peft.LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(plain(), adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def with_adapter_inside() -> Any:
    return with_adapter().get_base_model()


class Packed(nn.Module):
    """A linear map in 8 bits with a scale a row: what quantisers have in common."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        scaled = linear.weight.detach() / self.scale
        packed = scaled if dtype.is_floating_point else scaled.round()
        self.weight = nn.Parameter(packed.to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


def packed(dtype: torch.dtype = torch.int8) -> Any:
    model = plain()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Packed(child, dtype))
    return model


def packed_as_float8() -> Any:
    return packed(torch.float8_e4m3fn)


def torchao() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain()
    quantize_(model, Int8WeightOnlyConfig())
    return model


KINDS = [in_bfloat16, with_adapter, with_adapter_inside, packed, packed_as_float8, torchao]


@pytest.mark.parametrize("make", KINDS)
def test_it_stays_itself_and_its_side_network_is_float32_and_starts_as_it(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    input_ids = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    backbone = make()
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}
    with torch.no_grad():
        own = backbone(input_ids=input_ids).logits
    model = memlayer.wrap(backbone, CONFIG)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(input_ids).logits, own)
        tolerance = 0.1 if make is in_bfloat16 else 1e-4
        assert torch.allclose(model(input_ids).logits.float(), own.float(), atol=tolerance)
        model.memorize(input_ids)
        with_memory = model(input_ids).logits
    assert not torch.allclose(with_memory.float(), own.float(), atol=0.01)
    weights = dict(model.side_network.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not any("lora" in name for name in weights)
    assert len(weights) == len(dict(memlayer.wrap(plain(), CONFIG).side_network.named_parameters()))

    model.train()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in weights.items())
    for name, value in backbone.state_dict().items():
        assert torch.equal(unpacked(value), unpacked(frozen[name])), name
    model.eval()
    text = model.generate(input_ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0)
    assert text.shape == (2, 28)
    model.save_pretrained(tmp_path)
    again = memlayer.load(tmp_path, backbone=memlayer.wrap(make(), CONFIG).unwrap())
    again.memorize(input_ids)
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("make", KINDS)
def test_low_rank_updates_train_on_it_as_it_is(make: Callable[[], Any], tmp_path: Path) -> None:
    input_ids = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
    backbone = make()
    with torch.no_grad():
        own = backbone(input_ids=input_ids).logits
    config = replace(CONFIG, layer_reduction_factor=1, side_rank=2)
    model = memlayer.wrap(backbone, config)
    with torch.no_grad():
        assert torch.allclose(model(input_ids).logits, own, atol=0.05 if make is in_bfloat16 else 0)
    weights = dict(model.side_network.named_parameters())
    expected = memlayer.wrap(plain(), config).side_network
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in expected.named_parameters()
    }
    model.memorize(input_ids)
    model.train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(input_ids, labels=input_ids).loss.backward()
    ups = [weight for name, weight in weights.items() if name.endswith(".up")]
    assert all(bool(weight.grad.abs().sum() > 0) for weight in ups)
    optimizer.step()
    model.eval()
    model.save_pretrained(tmp_path)
    again = memlayer.load(tmp_path, backbone=memlayer.wrap(make(), CONFIG).unwrap())
    again.memorize(input_ids)
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def test_an_adapters_own_bias_is_copied_and_no_random_number_is_drawn() -> None:
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", lora_bias=True)
    with pytest.warns(UserWarning, match="has no bias"):
        model = peft.get_peft_model(plain(), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    layer = model.get_base_model().model.layers[0].eval()
    state = torch.random.get_rng_state()
    made = list(plain_linears(layer, torch.float32))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(made) == 7
    hidden = torch.randn(3, 64)
    for part, linear in made:
        assert torch.allclose(linear(hidden), part(hidden), atol=1e-4)


def test_a_prompt_that_was_learned_is_no_part_of_a_model() -> None:
    settings = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="adapter is PROMPT_TUNING, which puts a prom"):
        memlayer.wrap(peft.get_peft_model(plain(), settings), CONFIG)


def test_packed_weights_that_are_no_linear_map_are_refused() -> None:
    model = plain()
    for layer in model.model.layers:
        layer.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"keeps table as Tensor of torch\.int8"):
        memlayer.wrap(model, CONFIG)
