"""Where a model family's parts are: the contract of a decoder adapter.

A family is data. A `DecoderDescription` names modules by their path, and `find_parts` looks them up
in one model, checks that they are what the method needs, and gives a `DecoderParts`. No forward
pass is copied: the backbone's own code runs, and hooks on these modules read and write.

    decoder ── layers[0] … layers[L-1] ── final_norm ── output_projection ── head ──► logits
                 └ attention: query, key, value (before rotation) … attention_output
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn

from memlayer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.plugins import Plugins


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A module whose output is, or holds, the queries, keys or values of an attention layer.

    Attributes:
        module: path within the attention module. Its output is ``(B, T, heads * D)`` or
            ``(B, T, heads, D)``, before any rotary embedding and with norms on queries or keys
            (Qwen3) already applied: name the norm then.
        part: which of ``parts`` equal slices of the last dimension, where one module computes
            several (GPT-2's ``c_attn``: query 0, key 1, value 2 of 3).
        parts: equal slices that the output's last dimension is made of.
        heads: where heads lie otherwise: which slice of ``D`` numbers each of them is (BLOOM's
            queries: 0, 3, 6, ...). None: all of ``part``, in order.
        heads_first: the output is ``(B, heads, T, D)``.
        norm: path within the attention module of a norm that comes after the rotary embedding
            (HunYuan), and is given ``(B, heads, T, D)``. Heads are kept as they would be at
            position 0, where a rotation does nothing. Leave ``rotary`` out of the description then.
    """

    module: str
    part: int = 0
    parts: int = 1
    heads: tuple[int, ...] | None = None
    heads_first: bool = False
    norm: str | None = None

    def heads_of(self, attention: nn.Module, output: Tensor, head_dim: int) -> Tensor:
        """Give the heads ``(B, heads, T, D)`` that an attention module's projection computed.

        Args:
            attention: the module that the projection is in.
            output: of the projection's own module.
            head_dim: D.
        """
        heads = self.split_heads(output, head_dim)
        if self.norm is None:
            return heads
        normed: Tensor = attention.get_submodule(self.norm)(heads)
        return normed

    def split_heads(self, output: Tensor, head_dim: int) -> Tensor:
        """Cut this projection out of its module's output: ``(B, T, ...) -> (B, heads, T, D)``."""
        if self.heads_first:
            output = output.transpose(1, 2)
        batch, tokens = output.shape[:2]
        mine = output.reshape(batch, tokens, -1).chunk(self.parts, dim=-1)[self.part]
        split = mine.reshape(batch, tokens, -1, head_dim)
        if self.heads is not None:
            split = split[:, :, _as_slice(self.heads)]
        return split.transpose(1, 2)


def _as_slice(numbers: tuple[int, ...]) -> slice | list[int]:
    """Give evenly spaced numbers as a slice, which copies nothing."""
    steps = {after - before for before, after in itertools.pairwise(numbers)} or {1}
    if len(steps) == 1 and min(steps) > 0:
        return slice(numbers[0], numbers[-1] + 1, min(steps))
    return list(numbers)


@dataclass(frozen=True, kw_only=True)
class DecoderDescription:
    """Where the parts of one model family are.

    Paths are attribute paths with dots: the first group from the causal-LM model, the second from
    one layer's attention module. A path that a member of the family sets to None (OPT-350m has no
    final norm) is that part's absence; a path that does not exist is an error.
    """

    decoder: str
    """The module that maps token ids to hidden states, without the head."""
    layers: str
    """The list of layers. Each takes hidden states first and returns them (or a tuple)."""
    final_norm: str | None
    """The norm after the last layer; None where a family has none."""
    head: str | None = "lm_head"
    """The linear map to the vocabulary. None: all that the causal-LM model does behind its decoder,
    which may scale or cap logits."""
    output_projection: str | None = None
    """A linear map between final norm and head, where a family has one."""
    rotary: str | None = None
    """The module that gives ``(cos, sin)`` for position ids, by which queries are turned as LLaMA
    turns them; None for others. ``memory_distance`` needs it."""
    position_table: str | None = None
    """The embedding of learned positions; None for others, which have no last position."""

    attention: str
    """The attention module, from a layer."""
    query: Projection
    """Queries, from the attention module."""
    key: Projection
    """Keys."""
    value: Projection
    """Values."""
    attention_output: str
    """The linear map that reads the concatenated heads ``(B, T, H * D)``."""


@dataclass(frozen=True, kw_only=True)
class DecoderParts:
    """The parts of one backbone, found and checked.

    Attributes:
        description: where they were found.
        decoder: gives the last hidden state from token ids.
        layers: the L decoder layers.
        final_norm: after the last layer; an identity where the backbone has none.
        output_projection: between final norm and head; an identity where there is none.
        head: the map to the vocabulary; None if it is what the backbone does behind its decoder.
        rotary: ``(hidden, position_ids) -> (cos, sin)``, or None.
        num_attention_heads: H.
        num_key_value_heads: H_kv, a divisor of H.
        head_dim: D.
        hidden_size: E, the width of the residual stream.
        max_positions: tokens that a learned position table holds; None where there is none.
        scalings: for each layer, the factor on ``q . k`` before its softmax.
    """

    description: DecoderDescription
    decoder: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    output_projection: nn.Module
    head: nn.Module | None
    rotary: nn.Module | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    max_positions: int | None
    scalings: tuple[float, ...]

    @cached_property
    def takes_positions(self) -> bool:
        """Whether the decoder can be told ``position_ids``; others count by themselves."""
        return "position_ids" in inspect.signature(self.decoder.forward).parameters

    def attention(self, layer: nn.Module) -> nn.Module:
        """Give the attention module of a layer of this family."""
        return layer.get_submodule(self.description.attention)


def describe(backbone: PreTrainedModel, plugins: Plugins) -> DecoderDescription | None:
    """Find the decoder adapter that describes a backbone, by its ``config.model_type``, if any.

    Raises:
        PluginError: if the adapter is not a `DecoderDescription`.
    """
    model_type = backbone.config.model_type
    families = {
        served: entry.name for entry in plugins.adapters.entries() for served in entry.model_types
    }
    if model_type not in families:
        return None
    description = plugins.adapters.get(families[model_type])
    if not isinstance(description, DecoderDescription):
        raise UnsupportedModelError(
            f"decoder adapter {families[model_type]!r} must be a DecoderDescription, "
            f"got {type(description).__name__}"
        )
    return description


def find_parts(backbone: PreTrainedModel, description: DecoderDescription) -> DecoderParts:
    """Look up the described parts in a backbone.

    Raises:
        UnsupportedModelError: if a part is missing or is not what the method needs.
    """
    config = backbone.config.get_text_config(decoder=True)
    layers = _part(backbone, description.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"{type(backbone).__name__}.{description.layers} must be a list of layers, "
            f"got {type(layers).__name__}"
        )
    for layer in layers:
        attention = _module(layer, description.attention)
        for path in _attention_paths(description):
            _part(attention, path)
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    table = _part(backbone, description.position_table)
    if heads % key_value_heads:
        raise UnsupportedModelError(
            f"query heads must be a multiple of key/value heads, got {heads} and {key_value_heads}"
        )
    return DecoderParts(
        description=description,
        decoder=_module(backbone, description.decoder),
        layers=layers,
        final_norm=_part(backbone, description.final_norm) or nn.Identity(),
        output_projection=_part(backbone, description.output_projection) or nn.Identity(),
        head=None if description.head is None else _module(backbone, description.head),
        rotary=_part(backbone, description.rotary),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        max_positions=config.max_position_embeddings if table is not None else None,
        # Transformers' attention modules carry it; OPT's too, which applies it to queries already.
        scalings=tuple(
            float(getattr(_module(layer, description.attention), "scaling", head_dim**-0.5))
            for layer in layers
        ),
    )


def _attention_paths(description: DecoderDescription) -> Mapping[str, None]:
    projections = (description.query, description.key, description.value)
    norms = [item.norm for item in projections if item.norm is not None]
    modules = [item.module for item in projections]
    return dict.fromkeys([*modules, *norms, description.attention_output])


def _part(root: nn.Module, path: str | None) -> nn.Module | None:
    if path is None:
        return None
    found: object = root
    for name in path.split("."):
        if not hasattr(found, name):
            raise UnsupportedModelError(
                f"{type(root).__name__} has no part {path!r} (no {name!r} in "
                f"{type(found).__name__}); its decoder adapter does not describe this model"
            )
        found = getattr(found, name)
    if found is not None and not isinstance(found, nn.Module):
        raise UnsupportedModelError(
            f"{type(root).__name__}.{path} must be a module, got {type(found).__name__}"
        )
    return found


def _module(root: nn.Module, path: str) -> nn.Module:
    found = _part(root, path)
    if found is None:
        raise UnsupportedModelError(f"{type(root).__name__}.{path} must be a module, got None")
    return found
