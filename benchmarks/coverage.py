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
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
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

OWN: dict[str, dict[str, Any]] = {
    **{model_type: {"num_key_value_heads": 4} for model_type in LATENT.split()},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "mamba", "attention"]},
    "bamba": {"attn_layer_indices": [3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
    "rwkv": {"attention_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
}
"""What a default configuration leaves open, by model type."""


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
        build(model_type)(input_ids=torch.randint(5, 97, (2, 6)))
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
    config = CONFIG_MAPPING[model_type]()
    shrink(config)
    for name, value in OWN.get(model_type, {}).items():
        setattr(config, name, value)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


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
    "not tried": "Not tried: no small model by the rules of the benchmark",
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
