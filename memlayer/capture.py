"""Run a frozen backbone once and keep what the side network and the memory need.

The backbone's own forward runs. Hooks, there only for the time of one call, note each layer's
input, what else it was called with (mask, positions, cache), and the memory layers' keys and
values as their projections give them: before any rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Cache

    from memlayer.decoders import DecoderParts, Projection


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer was called with, beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BackboneStates:
    """What one backbone pass over ``T`` tokens left behind. Nothing in it carries a gradient.

    Attributes:
        hidden_states: the residual stream before any final norm, ``(B, T, E)`` each: the input of
            the first layer, then the output of every layer that was asked for.
        calls: what every layer whose call was asked for was called with.
        keys: one tensor a memory layer, ``(B, H_kv, T, D)``, not rotated.
        values: likewise.
        attention_mask: ``(B, T)``, bool, True for real tokens; None where all are.
        past_key_values: the cache that the backbone used and that side layers share; or None.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    attention_mask: Tensor | None = None
    past_key_values: Cache | None = None

    def gather_on(self, device: torch.device) -> None:
        """Bring what layers on several devices gave to one of them."""
        for kept in (self.hidden_states, self.keys, self.values):
            kept[:] = [tensor.to(device) for tensor in kept]


class _MemoryLayersDone(Exception):  # noqa: N818 - a signal to stop early, never an error
    """Raised inside the backbone once all keys and values are there."""


@torch.no_grad()
def run_backbone(
    parts: DecoderParts,
    *,
    outputs_of: Sequence[int],
    calls_of: Sequence[int],
    memory_layers: Sequence[int],
    **inputs: Any,
) -> BackboneStates:
    """Run the whole decoder, without its head.

    Args:
        parts: the backbone's parts.
        outputs_of: layers (from 0, rising, the last one included) whose output to keep.
        calls_of: layers, rising, of which to keep what they were called with.
        memory_layers: layers whose keys and values to keep, rising.
        inputs: keyword arguments of the decoder's forward.
    """
    states = BackboneStates()
    with ExitStack() as hooks:
        first = parts.layers[0]
        hooks.enter_context(_on_input(first, states.hidden_states.append))
        for index in calls_of:
            hooks.enter_context(_on_call(parts.layers[index], states.calls.append))
        for index in outputs_of:
            hooks.enter_context(_on_output(parts.layers[index], states.hidden_states.append))
        _keep_keys_and_values(parts, memory_layers, states, hooks)
        parts.decoder(**inputs)
    states.gather_on(_device_of(inputs))
    return states


@torch.no_grad()
def run_to_memory_layers(
    parts: DecoderParts, memory_layers: Sequence[int], **inputs: Any
) -> BackboneStates:
    """Run the decoder only up to the keys and values of its last memory layer."""
    states = BackboneStates()

    def stop_when_done(_: Tensor) -> None:
        if len(states.keys) == len(states.values) == len(memory_layers):
            raise _MemoryLayersDone

    with ExitStack() as hooks:
        _keep_keys_and_values(parts, memory_layers, states, hooks)
        attention = parts.attention(parts.layers[memory_layers[-1]])
        for projection in (parts.description.key, parts.description.value):
            module = attention.get_submodule(projection.module)
            hooks.enter_context(_on_output(module, stop_when_done))
        with suppress(_MemoryLayersDone):
            parts.decoder(**inputs)
    states.gather_on(_device_of(inputs))
    return states


def _device_of(inputs: Mapping[str, Any]) -> torch.device:
    given: Tensor = inputs["inputs_embeds" if inputs.get("input_ids") is None else "input_ids"]
    return given.device


def _keep_keys_and_values(
    parts: DecoderParts, memory_layers: Sequence[int], states: BackboneStates, hooks: ExitStack
) -> None:
    for index in memory_layers:
        attention = parts.attention(parts.layers[index])
        for projection, kept in (
            (parts.description.key, states.keys),
            (parts.description.value, states.values),
        ):
            hooks.enter_context(_on_projection(attention, projection, parts.head_dim, kept.append))


@contextmanager
def _on_input(layer: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    with layer.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def _on_call(layer: nn.Module, keep: Callable[[LayerCall], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        keep(LayerCall(args[1:], rest))

    with layer.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def _on_output(module: nn.Module, keep: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        keep(first_tensor(output))

    with module.register_forward_hook(hook):
        yield


@contextmanager
def _on_projection(
    attention: nn.Module, projection: Projection, head_dim: int, keep: Callable[[Tensor], None]
) -> Iterator[None]:
    def keep_heads(output: Tensor) -> None:
        keep(projection.heads_of(attention, output, head_dim))

    with _on_output(attention.get_submodule(projection.module), keep_heads):
        yield


def first_tensor(output: Any) -> Tensor:
    """Give a layer's hidden states, whether it returns them alone or first in a sequence."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden
