"""A released LongMem checkpoint (fairseq) as a backbone and a side network of ours.

    CHECKPOINT ─► names and shapes ─► OUTPUT/backbone   a LongMemGPTForCausalLM, its tokenizer
                                  └─► OUTPUT            what `memlayer.load` takes

No pickled code runs: the file is read as tensors and plain values only.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memlayer.config import LongMemConfig
from memlayer.errors import CheckpointError, ConfigError, DataError
from memlayer.longmem.model import LongMemGPTConfig, LongMemGPTForCausalLM
from memlayer.longmem.vocabulary import fairseq_tokenizer
from memlayer.model import LongMemModel, wrap
from memlayer.quiet import quiet_transformers

_BACKBONE = "decoder.pretrained_model.decoder.model."
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_UNUSED = {"decoder.embed_tokens.weight", "decoder.output_projection.weight", "decoder.version"}
_SIDE_NAMES = {"self_attn": "attn", "fc1": "mlp.fc_in", "fc2": "mlp.fc_out", "ln_1": "ln_1"}


@dataclass(frozen=True, kw_only=True)
class ReleasedSettings:
    """What the weights of a released checkpoint do not tell; the defaults are the paper's.

    Attributes:
        memory_layer: the backbone layer, from 0, whose keys and values are kept. None: as the
            checkpoint's own settings say, else the last that the reading side layer stands for.
        chunk_size: tokens of a chunk. None: as the checkpoint says, else 4.
        top_k: tokens read back. None: as the checkpoint says, else 64.
        memory_size: tokens that memory holds.
        segment_length: tokens of a window.
    """

    memory_layer: int | None = None
    chunk_size: int | None = None
    top_k: int | None = None
    memory_size: int = LongMemConfig.memory_size
    segment_length: int = LongMemConfig.segment_length


def convert_longmem(
    checkpoint: str | Path,
    output: str | Path,
    settings: ReleasedSettings | None = None,
    vocabulary: str | Path | None = None,
) -> LongMemModel:
    """Convert a released checkpoint, and give the model.

    Args:
        checkpoint: ``.pt``, or the same state dict as ``.safetensors``.
        output: a folder, made if need be: gets the side network, and the backbone in ``backbone/``.
        settings: the defaults if None.
        vocabulary: a folder with fairseq's ``dict.txt`` and GPT-2's ``encoder.json`` and
            ``vocab.bpe``. None: the backbone gets no tokenizer, and takes ids only.

    Raises:
        CheckpointError: if the file cannot be read, or is not a LongMem checkpoint.
        DataError: if the vocabulary cannot be read, or has more tokens than the model.
        ConfigError: if a setting does not fit the weights.
    """
    place, output = Path(checkpoint), Path(output)
    tokenizer = None if vocabulary is None else fairseq_tokenizer(vocabulary)
    state, told = _read(place)
    model = _model_of(state, settings or ReleasedSettings(), told, place)
    backbone = output / "backbone"
    if tokenizer is not None:
        if len(tokenizer) > model.backbone.config.vocab_size:
            raise DataError(
                f"the vocabulary in {vocabulary} has {len(tokenizer)} tokens, {place} has "
                f"{model.backbone.config.vocab_size}; give the dict.txt that it was trained with"
            )
        tokenizer.save_pretrained(backbone)
    with quiet_transformers():
        model.backbone.save_pretrained(backbone)
    model.backbone.name_or_path = str(backbone.resolve())
    model.save_pretrained(output)
    return model


def _model_of(
    state: Mapping[str, Tensor],
    settings: ReleasedSettings,
    told: Mapping[str, Any],
    place: Path,
) -> LongMemModel:
    """Make a model of a released state dict.

    Args:
        state: tensors by their released names.
        settings: what they do not tell.
        told: the checkpoint's own settings (``k``, ``chunk_size``, ``retrieval_layer_index``).
        place: for messages.
    """
    backbone, side = _sorted(state, place)
    depth, layers = _count(backbone, r"transformer\.h\.(\d+)\."), _count(side, r"layers\.(\d+)\.")
    readers = [name.split(".")[1] for name in side if name.endswith("memory_bias")]
    if not depth or not layers or depth % layers or len(readers) != 1:
        raise CheckpointError(
            f"{place} is no LongMem checkpoint: it has {depth} backbone blocks, {layers} side "
            f"layers and {len(readers)} gates, where the second divides the first and one gate "
            "was expected"
        )
    reader, reduction = int(readers[0]), depth // layers
    gate = side.pop(f"layers.{reader}.self_attn.memory_bias")
    words = backbone["transformer.wte.weight"]
    config = LongMemGPTConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_hidden_layers=depth,
        num_attention_heads=gate.numel(),
    )
    made = LongMemGPTForCausalLM(config)
    _fill(made, backbone, place)
    last = reduction * (reader + 1) - 1
    memory_layer = _chosen(settings.memory_layer, told, "retrieval_layer_index", last, place)
    if memory_layer // reduction != reader:
        raise ConfigError(
            f"memory_layer must be one of {reduction * reader} to {last}, "
            f"which side layer {reader} reads, got {memory_layer}"
        )
    memory = LongMemConfig(
        memory_layers=(memory_layer,),
        layer_reduction_factor=reduction,
        chunk_size=_chosen(
            settings.chunk_size, told, "chunk_size", LongMemConfig.chunk_size, place
        ),
        top_k=_chosen(settings.top_k, told, "k", LongMemConfig.top_k, place),
        memory_size=settings.memory_size,
        segment_length=settings.segment_length,
        side_init="backbone",
        normed_residual=True,
    )
    model = wrap(made.train(False), memory)
    weights = {_side_name(name): value for name, value in side.items()}
    _fill(model.side_network, weights | {"gates.0": gate.flatten()}, place)
    return model.eval()


def _read(place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and plain values, whatever else a file may hold."""
    try:
        if place.suffix == ".safetensors":
            return load_file(place), {}
        # The settings of a fairseq run: a bare container of names and values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(place, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"cannot read {place} ({str(error).splitlines()[0]})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{place} holds more than tensors and plain values, which memlayer does not load; save "
            "its 'model' entry as .safetensors and give that"
        ) from error
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{place} is no fairseq checkpoint: it has no entry 'model'")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise CheckpointError(
                f"{place} is no fairseq checkpoint: its 'model' has {type(value).__name__} under "
                f"{name!r:.80}, where a tensor under a name was expected"
            )
    # Older files have "args"; newer ones "cfg", a part of which is "model".
    told = _values(content.get("args")) or _values(_values(content.get("cfg")).get("model"))
    return state, told


def _values(settings: object) -> dict[str, Any]:
    """Give settings by name, if that is what they are."""
    if isinstance(settings, argparse.Namespace):
        return vars(settings)
    return settings if isinstance(settings, dict) else {}


def _chosen(
    given: int | None, told: Mapping[str, Any], name: str, default: int, place: Path
) -> int:
    """Give a setting: the caller's, else the checkpoint's, else the paper's."""
    if given is not None:
        return given
    value = told.get(name, default)
    if type(value) is not int:
        raise CheckpointError(
            f"{place} says {name}={value!r:.80}, which is no whole number; give the setting"
        )
    return value


def _sorted(
    state: Mapping[str, Tensor], place: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part backbone and side network, each by shorter names."""
    backbone, side = {}, {}
    for name, value in state.items():
        if name.startswith(_BACKBONE):
            backbone[name.removeprefix(_BACKBONE)] = value.float()
        elif name.startswith(("decoder.layers.", "decoder.layer_norm.")):
            side[name.removeprefix("decoder.")] = value.float()
        elif name not in _UNUSED:
            raise CheckpointError(f"{place} is no LongMem checkpoint: it has a tensor {name!r:.80}")
    if "transformer.wte.weight" not in backbone:
        raise CheckpointError(f"{place} is no LongMem checkpoint: it has no backbone in it")
    return backbone, side


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _side_name(name: str) -> str:
    """Give our name of one of the side network's tensors."""
    found = _LAYER.match(f"decoder.{name}")
    if found is None:
        return name.replace("layer_norm.", "norm.")
    part, _, rest = found[2].partition(".")
    return f"layers.{found[1]}.{_SIDE_NAMES.get(part, part)}.{rest}"


def _fill(module: torch.nn.Module, weights: Mapping[str, Tensor], place: Path) -> None:
    """Load weights, every one of them and no other."""
    own = module.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = own.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise CheckpointError(
                f"{place} does not fit its own sizes: {name} is "
                f"{'missing' if there is None else tuple(there.shape)}, expected "
                f"{'nothing' if here is None else tuple(here.shape)}"
            )
    module.load_state_dict(dict(weights))
