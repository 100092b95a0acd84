"""Descriptions of decoders: found in a model, or refused with what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from memlayer.decoders import Projection, describe, find_parts
from memlayer.errors import UnsupportedModelError
from memlayer.plugins import default_plugins
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
