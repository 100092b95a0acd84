"""Backbones that accelerate has spread over devices, main memory and disk (``device_map``).

Such a model's modules carry hooks that bring weights to where they are run and take them away
again; until then a weight may be on no device at all ("meta"). Side layers are made of real weights
and lie together, where the model's inputs and outputs do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """Give where a module is run, wherever its weights are now."""
    for part in module.modules():
        device = getattr(_hook(part), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def with_weights(module: nn.Module) -> Iterator[None]:
    """Have a module's weights, all the way down, where it is run while this is entered."""
    with ExitStack() as stack:
        for part in module.modules():
            hook = _hook(part)
            if getattr(hook, "offload", False):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Give a model's weight by its name, wherever it is now."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    weight: Tensor = getattr(module, leaf)
    if not weight.is_meta:
        return weight
    with with_weights(module):
        weight = getattr(module, leaf)
        return weight.detach().clone()


def hooks_of(module: nn.Module) -> list[Any]:
    """Give the hooks of a module and those in it, which hold what a copy must not copy."""
    return [hook for part in module.modules() if (hook := _hook(part)) is not None]


def strip_hooks(module: nn.Module) -> None:
    """Make a copy of a spread module an ordinary one."""
    for part in module.modules():
        if _hook(part) is not None:
            for name in ("_hf_hook", "_old_forward", "forward"):
                vars(part).pop(name, None)


def _hook(module: nn.Module) -> Any:
    return vars(module).get("_hf_hook")
