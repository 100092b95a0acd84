"""Descriptions of decoders: found in a model, or refused with what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import memlayer
from memlayer.decoders import Projection, describe, find_parts
from memlayer.discovery import discover
from memlayer.errors import UnsupportedModelError
from memlayer.plugins import default_plugins
from memlayer.testing import DecoderConformance
from memlayer_adapters.llama import LLAMA


@pytest.mark.parametrize(
    ("family", "heads", "positions", "norm"),
    [
        ("gpt2", (4, 4, 8), 512, nn.LayerNorm),
        ("opt", (4, 4, 8), 512, nn.LayerNorm),
        ("opt-350m", (4, 4, 8), 512, nn.Identity),
        ("llama", (4, 2, 8), None, nn.Module),
        ("qwen3", (4, 2, 8), None, nn.Module),
    ],
)
def test_parts_of_every_family_are_found(family, heads, positions, norm, make_backbone):
    backbone = make_backbone(family)
    parts = find_parts(backbone, describe(backbone, default_plugins()))
    assert (parts.num_attention_heads, parts.num_key_value_heads, parts.head_dim) == heads
    assert len(parts.layers) == 4
    assert parts.max_positions == positions
    assert isinstance(parts.final_norm, norm)
    assert parts.head is backbone.lm_head
    assert (parts.rotary is None) == (positions is not None)


def test_a_fused_projection_is_cut_into_its_heads():
    output = torch.arange(2 * 3 * 24.0).view(2, 3, 24)
    heads = Projection(module="c_attn", part=1, parts=3).split_heads(output, head_dim=4)
    assert heads.shape == (2, 2, 3, 4)
    assert torch.equal(heads[1, 1, 2], output[1, 2, 12:16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "model.blocks"}, "has no part 'model.blocks' .no 'blocks' in LlamaModel"),
        ({"layers": "model.norm"}, "model.norm must be a list of layers, got LlamaRMSNorm"),
        ({"attention": "attn"}, "LlamaDecoderLayer has no part 'attn'"),
        ({"query": Projection(module="c_attn")}, "LlamaAttention has no part 'c_attn'"),
        ({"attention_output": "layer_idx"}, "layer_idx must be a module, got int"),
        ({"head": "model.config"}, "model.config must be a module, got LlamaConfig"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change, message, make_backbone):
    with pytest.raises(UnsupportedModelError, match=message):
        find_parts(make_backbone("llama"), replace(LLAMA, **change))


NORMS_AFTER_ROTATION = ["hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat"]


def make_with_norms_after_rotation(model_type):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "moe_topk": 2} if "moe" in model_type else {}
    config = AutoConfig.for_model(model_type, pad_token_id=0, **sizes, **depth, **experts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.data.uniform_(0.3, 1.7)
            else:
                weight.data.normal_(0, 0.15)
    return model


@pytest.mark.parametrize("model_type", NORMS_AFTER_ROTATION)
class TestNormsAfterRotation(DecoderConformance):
    @pytest.fixture(autouse=True)
    def _family(self, model_type):
        self.model_type = model_type

    def make_backbone(self):
        return make_with_norms_after_rotation(self.model_type)


@pytest.mark.parametrize("model_type", NORMS_AFTER_ROTATION)
def test_keys_behind_a_rotation_are_those_of_position_0(model_type):
    """What is kept of the first token is what the attention itself caches of it."""
    backbone = make_with_norms_after_rotation(model_type)
    model = memlayer.wrap(backbone, memlayer.LongMemConfig(backend="torch", memory_layers=(0, 2)))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        cache = backbone(ids, use_cache=True).past_key_values
        states = model.encode(ids)
        with pytest.raises(UnsupportedModelError, match="know their position"):
            discover(backbone)
    for layer, keys in zip((0, 2), states.keys, strict=True):
        torch.testing.assert_close(keys[:, :, 0], cache.layers[layer].keys[:, :, 0])
        assert not torch.allclose(keys[:, :, 2], cache.layers[layer].keys[:, :, 2], atol=1e-2)
