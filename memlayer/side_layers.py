"""Side layers out of backbone layers: trainable copies, and frozen twins.

A copy has weights of its own, ordinary ones in float32 or wider. A twin runs the very weights of
the layer that it stands for, with a place of its own in the KV cache and hooks of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memlayer.compilation import release_layers
from memlayer.dispatch import hooks_of, strip_hooks, with_weights
from memlayer.errors import UnsupportedModelError
from memlayer.plain_linear import is_packed, plain_linears

if TYPE_CHECKING:
    from memlayer.decoders import DecoderParts


def layer_numbers(layers: nn.ModuleList) -> list[tuple[str, str]]:
    """Find where a layer keeps its own number (``layer_idx``, ``layer_id``): path and attribute."""
    return [
        (path, name)
        for path, module in layers[0].named_modules()
        for name in vars(module)
        if "layer" in name
        and all(
            type(found := getattr(layer.get_submodule(path), name, None)) is int and found == number
            for number, layer in enumerate(layers)
        )
    ]


def copy_layer(
    layer: nn.Module, numbered: Sequence[tuple[str, str]], number: int, dtype: torch.dtype
) -> nn.Module:
    """Copy a decoder layer as a trainable one with a place of its own in the KV cache."""
    copied = copy_module(layer, dtype)
    for path, name in numbered:
        setattr(copied.get_submodule(path), name, number)
    return copied


def twin_layer(layer: nn.Module, numbered: Sequence[tuple[str, str]], number: int) -> nn.Module:
    """Give a frozen layer of the same weights with a place of its own in the KV cache.

    Raises:
        UnsupportedModelError: if the backbone is spread over devices.
    """
    if hooks_of(layer):
        raise UnsupportedModelError(
            "side layers with the backbone's own weights (coupled, side_rank) need a backbone on "
            "one device, got one that device_map has spread; load it without"
        )
    made = _twin(layer)
    for path, name in numbered:
        setattr(made.get_submodule(path), name, number)
    return made


def _twin(module: nn.Module) -> nn.Module:
    made = copy.copy(module)  # shares the dictionaries of its tensors, whatever is put there later
    release_layers([made])
    made.training = False
    for name, value in vars(made).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(made)[name] = type(value)()
    made._modules = OrderedDict(
        (name, None if child is None else _twin(child)) for name, child in module._modules.items()
    )
    return made


def copy_module(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a module as a trainable one, with linear maps that are kept otherwise made plain.

    Raises:
        UnsupportedModelError: if it keeps weights in few bits that are in no linear map.
    """
    # Configurations stay shared, so that a change of attention implementation reaches the copies.
    shared: dict[int, Any] = {
        id(part.config): part.config for part in module.modules() if hasattr(part, "config")
    }
    shared |= {id(hook): hook for hook in hooks_of(module)}
    with with_weights(module):
        made = [(id(part), linear) for part, linear in plain_linears(module, dtype)]
        copied = copy.deepcopy(module, shared | dict(made))
    strip_hooks(copied)
    release_layers(copied.modules())  # compiled code belongs to what it was compiled for
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        # A family's own: what is not the same in its side network.
        become: Callable[[], None] | None = getattr(part, "to_side_network", None)
        if become is not None:
            become()
    for name, weight in copied.named_parameters():
        if is_packed(weight):
            raise UnsupportedModelError(
                f"{type(module).__name__} keeps {name} as {type(weight.data).__name__} of "
                f"{weight.dtype} and not in a linear map, so a side layer cannot be made of it; "
                "load the backbone unquantized"
            )
    return copied.requires_grad_(True)


def weights_dtype(parts: DecoderParts) -> torch.dtype:
    """Give what layers compute with: norms, which no quantiser touches, are kept in it."""
    weights = itertools.chain(parts.final_norm.parameters(), parts.layers.parameters())
    return next((weight.dtype for weight in weights if not is_packed(weight)), torch.float32)
