"""Families that no adapter describes: their parts are found by what modules do, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
)

import memlayer
from memlayer.decoders import describe, find_parts
from memlayer.discovery import discover
from memlayer.errors import ConfigError, UnsupportedModelError
from memlayer.plugins import default_plugins
from memlayer.testing import DecoderConformance

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
BART = {"encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 4, "head_dim": None}
FOUND: dict[str, dict[str, Any]] = {
    "bart": BART | {"decoder_ffn_dim": 48, "is_decoder": True, "is_encoder_decoder": False},
    "bloom": {"n_head": 4, "n_layer": 4},
    # Its module of cosines and sines wants more than positions, and raises something of its own.
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "falcon": {"alibi": False, "multi_query": True, "head_dim": None},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"rotary_pct": 0.25},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "stablelm": {},
    "starcoder2": {},
}


def make(model_type: str, **changes: Any) -> PreTrainedModel:
    """Build a small random model of any family."""
    settings = {name: value for name, value in (SIZES | changes).items() if value is not None}
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.data.normal_(0, 0.15)
            elif "bias" in name:
                weight.data.normal_(0, 0.05)
    return model.eval()


@pytest.mark.parametrize("family", ["gpt2", "opt", "opt-350m", "llama", "mistral", "qwen3"])
def test_what_is_found_is_what_an_adapter_describes(
    family: str, make_backbone: Callable[..., PreTrainedModel]
) -> None:
    backbone = make_backbone(family)
    description = describe(backbone, default_plugins())
    assert description is not None
    described, found = find_parts(backbone, description), discover(backbone)
    for name in ("decoder", "layers", "rotary"):
        assert getattr(found, name) is getattr(described, name), name
    for name in ("final_norm", "output_projection"):
        own, other = getattr(found, name), getattr(described, name)
        assert own is other or (type(own) is type(other) is torch.nn.Identity), name
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    for name in (*sizes, "max_positions"):
        assert getattr(found, name) == getattr(described, name), name
    if not family.startswith("opt"):  # OPT scales its queries itself
        assert found.scalings == pytest.approx(described.scalings, rel=1e-4)
    layer = backbone.get_submodule(description.layers)[0]
    for name in ("query", "key", "value"):
        own, other = getattr(found.description, name), getattr(description, name)
        output = torch.randn(2, 3, 3 * 32 if other.parts == 3 else 32 if name == "query" else 16)
        if family == "qwen3":
            output = output.unflatten(2, (-1, 8))
        if description.key.parts == 1 and found.num_key_value_heads == 4:
            output = torch.randn(2, 3, 32)
        assert torch.equal(own.split_heads(output, 8), other.split_heads(output, 8)), name
        module = found.attention(layer).get_submodule(own.module)
        assert module is described.attention(layer).get_submodule(other.module), name


@pytest.mark.parametrize("model_type", sorted(FOUND))
class TestFamiliesWithoutAnAdapter(DecoderConformance):
    @pytest.fixture(autouse=True)
    def _family(self, model_type: str) -> None:
        self.model_type = model_type

    def make_backbone(self) -> PreTrainedModel:
        return make(self.model_type, **FOUND[self.model_type])


@pytest.mark.parametrize("model_type", ["granite", "bloom", "gpt_neox"])
def test_the_probe_leaves_a_model_as_it_was(model_type: str) -> None:
    backbone = make(model_type, **FOUND[model_type]).train()
    attention = backbone.config._attn_implementation
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    random = torch.random.get_rng_state()
    discover(backbone)
    assert all(module.training for module in backbone.modules())
    assert backbone.config._attn_implementation == attention
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parts_are_found_in_other_dtypes_too(dtype: torch.dtype) -> None:
    parts = discover(make("stablelm").to(dtype))
    assert parts.scalings == pytest.approx([8**-0.5] * 4, rel=0.05)


@pytest.mark.parametrize(
    ("model_type", "most"),
    # BART's table is called with the token ids, and looks at their shape only.
    [("bart", 128), ("gpt_bigcode", 128), ("bloom", None), ("gemma2", None)],
)
def test_a_table_of_positions_is_told_from_one_of_words(model_type: str, most: int | None) -> None:
    model = memlayer.wrap(make(model_type, **FOUND[model_type]))
    assert model.parts.max_positions == most
    if most is not None:
        with pytest.raises(ConfigError, match=f"learned positions for {most} tokens, got 129"):
            model(torch.ones(1, 129, dtype=torch.long))


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bert", {"is_decoder": False}, "layer 0 changes earlier tokens when a later one changes"),
        (
            "prophetnet",
            {
                "num_hidden_layers": None,
                "num_encoder_layers": 4,
                "num_decoder_layers": 4,
                "num_decoder_attention_heads": 4,
                "is_encoder_decoder": False,
                "is_decoder": True,
            },
            "layer 0 is called with 9 hidden states for 3 tokens, where one each was expected",
        ),
        ("diffllama", {}, "layer 0 has 2 softmax attentions over its tokens"),
        ("mamba", {}, "keeps no cache of keys and values"),
        ("openai-gpt", {"n_embd": 32, "n_layer": 4, "n_head": 4}, "keeps no cache of keys and val"),
    ],
)
def test_what_cannot_be_told_for_certain_is_refused(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        memlayer.wrap(make(model_type, **changes))
    assert f"no decoder adapter for model_type {model_type!r}" in str(caught.value)
    assert "docs/adapters.md" in str(caught.value)


def test_a_model_that_reads_no_rows_of_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    streams = MusicgenForCausalLM(MusicgenDecoderConfig(vocab_size=97, num_codebooks=4, **sizes))
    with pytest.raises(UnsupportedModelError, match="it has no one table of words, for rows of"):
        memlayer.wrap(streams.eval())
    backbone = make("bloom", **FOUND["bloom"])
    monkeypatch.setattr(type(backbone.config), "get_text_config", lambda *_, **__: object())
    with pytest.raises(UnsupportedModelError, match="its configuration names no number of layers"):
        discover(backbone)
