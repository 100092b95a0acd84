"""Which causal-LM classes of transformers get a memory: build each of them small, and check.

    python benchmarks/coverage.py [--output docs/models.md] [MODEL_TYPE ...]

Every model type of the installed transformers is built with a few tiny layers and random weights,
wrapped, and put through `memlayer.testing.DecoderConformance`. What `wrap` refuses is listed with
its reason; what cannot be built small by the rules below is listed as not tried, with the error.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import memlayer
from memlayer.discovery import parts_of
from memlayer.errors import UnsupportedModelError
from memlayer.plugins import default_plugins
from memlayer.testing import DecoderConformance

SIZES: dict[int, str] = {
    97: "vocab_size n_vocab",
    32: "hidden_size n_embd d_model dim n_embed",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim",
    16: "kv_lora_rank q_lora_rank",
    512: "max_position_embeddings n_positions",
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group num_expert_group",
}
"""What a configuration's fields are set to, where it has them."""

PAIRS = "num_key_value_heads num_experts_per_tok moe_topk moe_k eos_token_id"
"""Likewise, to 2."""

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Lists of one entry a layer."""

LATENT = (
    "axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear minicpm3 youtu"
)
"""Families with latent attention, which have as many key/value heads as query heads."""

INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hc_lowrank": 8,
    "ple_embed_dim": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}

OWN: dict[str, dict[str, Any]] = {
    **{model_type: {"num_key_value_heads": 4} for model_type in LATENT.split()},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_key_value_heads": 4,
        "shared_intermediate_size": 48,
        **MAMBA,
    },
    "bamba": {"attn_layer_indices": [3], **MAMBA},
    "bailing_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense"] * 4,
        "num_key_value_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "qk_head_dim": 16,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "num_key_value_heads": 4,
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "longcat_flash": {
        "qk_head_dim": 16,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 48,
        "zero_expert_num": 0,
        "moe_topk": 2,
        "num_key_value_heads": 4,
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "num_blocks": 4,
        "num_heads": 2,
        "qk_dim_factor": 1.0,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp": {"num_key_value_heads": 2, **INDEXER},
    "qwen4_exp_text": {"num_key_value_heads": 2, **INDEXER},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "rwkv": {"attention_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
}
"""What a default configuration leaves open, by model type."""

OTHER_INPUT = {"blt", "musicgen", "musicgen_melody"}
"""Not run on rows of ids before they are wrapped: they read bytes in patches, or four streams."""


@dataclass(frozen=True)
class Outcome:
    """What came of one model type: kind is works, fails, refused or not tried."""

    model_type: str
    kind: str
    text: str


def main() -> int:
    """Run the benchmark; give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="all if none is given")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = []
    for model_type in arguments.model_types or sorted(CLASSES):
        outcome = examine(model_type, arguments.debug)
        print(f"{outcome.model_type}: {outcome.kind}. {outcome.text}", flush=True)
        outcomes.append(outcome)
    counts = {kind: sum(one.kind == kind for one in outcomes) for kind in KIND_TITLES}
    print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
    if arguments.output is not None:
        arguments.output.write_text("\n".join(report(outcomes)) + "\n", encoding="utf-8")
    return 1 if counts["fails"] else 0


def examine(model_type: str, debug: bool) -> Outcome:
    """Build one model and put it through everything."""
    try:
        small = build(model_type)
        if model_type not in OTHER_INPUT:
            small(input_ids=torch.randint(5, 97, (2, 6)))
    except (Exception, SystemExit) as error:
        if debug:
            traceback.print_exc()
        return Outcome(model_type, "not tried", one_line(error))
    backbone = build(model_type)
    try:
        memlayer.wrap(backbone, memlayer.LongMemConfig(backend="torch"))
    except UnsupportedModelError as error:
        reason = str(error).partition("by itself: ")[2].rpartition("; docs/")[0]
        return Outcome(model_type, "refused", reason or str(error))
    except Exception as error:
        if debug:
            traceback.print_exc()
        return Outcome(model_type, "fails", f"wrap: {one_line(error)}")
    suite = type("Suite", (DecoderConformance,), {"make_backbone": lambda _: build(model_type)})()
    found = list(limits(backbone))
    for name in sorted(name for name in dir(suite) if name.startswith("test_")):
        try:
            getattr(suite, name)()
        except pytest.skip.Exception as skipped:
            found.append(str(skipped))
        except Exception as error:
            if debug:
                traceback.print_exc()
            return Outcome(model_type, "fails", f"{name}: {one_line(error)}")
    return Outcome(model_type, "works", "; ".join(found))


def limits(backbone: transformers.PreTrainedModel) -> Iterator[str]:
    """Say what a family cannot do, or does otherwise."""
    parts = parts_of(backbone, default_plugins())
    config = backbone.config.get_text_config(decoder=True)
    if parts.rotary is None:
        yield "no `memory_distance`"
    if parts.max_positions is not None:
        yield "a window has at most `max_position_embeddings` tokens"
    if getattr(config, "attn_logit_softcapping", None):
        yield "scores of memory are not capped"
    if any("sinks" in name for name, _ in backbone.named_parameters()):
        yield "memory has no attention sinks"


def build(model_type: str) -> transformers.PreTrainedModel:
    """Build a model of this type, small; the same every time."""
    config = config_of(model_type)
    shrink(config)
    for name, value in OWN.get(model_type, {}).items():
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            for inner_name, inner_value in value.items():
                setattr(inner, inner_name, inner_value)
        else:
            setattr(config, name, value)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    made = getattr(transformers, CLASSES[model_type])._from_config(config)
    model: transformers.PreTrainedModel = made.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def config_of(model_type: str) -> Any:
    """Give the default configuration, or the part of it that is the language model's own."""
    config = CONFIG_MAPPING[model_type]()
    kind = getattr(transformers, CLASSES[model_type]).config_class
    parts = [value for value in vars(config).values() if isinstance(value, kind)]
    return config if isinstance(config, kind) or len(parts) != 1 else parts[0]


def shrink(config: Any) -> None:
    """Set the sizes of a configuration, and of those in it."""
    fields = {name: value for value, names in SIZES.items() for name in names.split()}
    fields |= dict.fromkeys(PAIRS.split(), 2)
    for name, value in fields.items():
        try:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, value)
        except Exception:
            continue
    for name in KINDS:
        if isinstance(getattr(config, name, None), (list, tuple)):
            try:
                setattr(config, name, of_every_kind(list(getattr(config, name))))
            except AttributeError:
                continue
    for name in getattr(config, "sub_configs", {}):
        own = getattr(config, name, None)
        if own is not None and hasattr(own, "to_dict"):
            shrink(own)


def of_every_kind(layers: list[Any]) -> list[Any]:
    """Give four layers' kinds, two kinds among them where there are two."""
    others = [kind for kind in layers if kind != layers[0]]
    return layers[:3] + (layers[3:4] if len(set(layers[:3])) > 1 or not others else others[:1])


def one_line(error: BaseException) -> str:
    """Give an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"


KIND_TITLES = {
    "works": "Works",
    "fails": "Wrapped, but fails a check",
    "refused": "Refused",
    "not tried": "Not tried: it could not be built",
}


def report(outcomes: list[Outcome]) -> Iterator[str]:
    """Give docs/models.md."""
    yield "# Causal-LM classes of transformers"
    yield ""
    yield (
        f"Made by `python benchmarks/coverage.py --output docs/models.md` with transformers "
        f"{transformers.__version__}: every model type, built small with random weights, wrapped, "
        "and put through `memlayer.testing.DecoderConformance` (adapter disabled: the backbone bit "
        "for bit; keys as a whole forward computes them and free of positions; rows apart; "
        "gradients; cached steps; `generate`; save and load). How parts are found: "
        "[adapters.md](adapters.md)."
    )
    for kind, title in KIND_TITLES.items():
        found = [outcome for outcome in outcomes if outcome.kind == kind]
        if not found:
            continue
        column = "limits" if kind == "works" else "reason"
        yield ""
        yield f"## {title} ({len(found)})"
        yield ""
        yield f"| model type | class | {column} |"
        yield "| --- | --- | --- |"
        for one in found:
            text = one.text.replace("|", "/")
            yield f"| `{one.model_type}` | {CLASSES[one.model_type]} | {text} |"


if __name__ == "__main__":
    sys.exit(main())
