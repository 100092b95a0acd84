"""Decoder layers compiled in place, where nothing looks inside them.

Layers of whose inside the memory needs something (queries, keys, values, heads) are run with hooks
there, which come and go with each call and which compiled code would not see. All others are
compiled, each for itself: they are alike, so one compilation serves them all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from memlayer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


def compile_layers(layers: Iterable[nn.Module], **options: Any) -> None:
    """Let layers run compiled, unless they are called with a cache of keys and values.

    Args:
        layers: not compiled yet, or they are left as they are.
        options: of `torch.compile`.
    """
    for layer in layers:
        if not is_compiled(layer):
            own = vars(layer).get("forward")
            layer.forward = _Forward(layer.forward, own, options)


def release_layers(layers: Iterable[nn.Module]) -> None:
    """Let layers run as they did before they were compiled."""
    for layer in layers:
        if is_compiled(layer):
            own = vars(layer).pop("forward").own
            if own is not None:
                layer.forward = own


def is_compiled(layer: nn.Module) -> bool:
    """Whether `compile_layers` was here."""
    return isinstance(vars(layer).get("forward"), _Forward)


def refuse_compiled(backbone: Any) -> None:
    """Refuse a model in which hooks would be ignored.

    Raises:
        UnsupportedModelError: if it, or a module of it, is compiled as a whole.
    """
    if hasattr(backbone, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in backbone.modules()
    ):
        raise UnsupportedModelError(
            "the backbone is compiled, so that memlayer cannot see what its layers compute; wrap "
            "it as it is and call model.compile()"
        )


class _Forward:
    """A layer's forward, eager and compiled.

    With a cache every layer writes to a place of its own, and nothing would be alike.
    """

    def __init__(self, eager: Any, own: Any, options: dict[str, Any]) -> None:
        self.eager = eager
        # Not its class's, but one that somebody (accelerate, say) gave to this layer alone.
        self.own = own
        self._options = options
        self._compiled = torch.compile(eager, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        # A bound method's copy is bound to the layer's copy; compiled code would stay with this.
        eager, own = copy.deepcopy((self.eager, self.own), memo)
        return _Forward(eager, own, self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cached = any(isinstance(given, Cache) for given in (*args, *kwargs.values()))
        return (self.eager if cached else self._compiled)(*args, **kwargs)
