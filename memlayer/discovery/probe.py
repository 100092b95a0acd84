"""Run a few tokens through a decoder and note what its modules do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memlayer.discovery.products import Product, ProductRecorder
from memlayer.dispatch import execution_device
from memlayer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 8
"""B of the probe: rows of different tokens, so that no two columns of an output are alike."""

TOKENS = 3
"""T of the probe: a token, the same again, and another. At position 0 a rotation does nothing."""


@dataclass(frozen=True)
class Event:
    """A module's input or output, or an attention product, in the order of execution.

    Attributes:
        path: of the module, from its layer (or from the decoder); "" for a product.
        given: the first tensor that it was called with; None for a product.
        output: the first tensor that it gave; None before it has.
        product: of an attention.
    """

    path: str
    given: Tensor | None = None
    output: Tensor | None = None
    product: Product | None = None


@dataclass
class LayerTrace:
    """What happened in one layer.

    Attributes:
        given: hidden states that it got, ``(B, T, E)``.
        output: that it gave.
        takes_hidden_states: whether it got them as capture.py expects, first or by that name.
        events: in order.
    """

    given: Tensor | None = None
    output: Tensor | None = None
    takes_hidden_states: bool = True
    events: list[Event] = field(default_factory=list)


@dataclass
class Trace:
    """What happened in a whole decoder.

    Attributes:
        ids: ``(B, T)``, the probe.
        layers: one a layer.
        outside: modules of the decoder that are in no layer, each once it has given its output.
        calls: what these were called with, by path.
        last: the decoder's last hidden state, ``(B, T, E)``.
        logits: the backbone's, ``(B, T, V)``.
    """

    ids: Tensor
    layers: list[LayerTrace]
    outside: list[Event] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    last: Tensor | None = None
    logits: Tensor | None = None


@torch.no_grad()
def run_probe(
    backbone: PreTrainedModel, decoder: nn.Module, layers: nn.ModuleList, *, other_end: bool = False
) -> Trace:
    """Run the probe through a backbone.

    Args:
        backbone: in any mode; it is run in evaluation mode, with eager attention.
        decoder: its decoder.
        layers: the decoder's layers.
        other_end: take another last token, to see what it changes before itself.

    Raises:
        UnsupportedModelError: if the backbone cannot be run on plain token ids.
    """
    ids = _tokens(backbone, other_end)
    trace = Trace(ids=ids, layers=[LayerTrace() for _ in layers])
    inside = {id(module) for layer in layers for module in layer.modules()} | {id(layers)}
    with ExitStack() as stack:
        stack.enter_context(_as_for_probe(backbone))
        recorder = ProductRecorder(ROWS, TOKENS, lambda product: _keep(trace, product, current))
        current: list[int] = []
        for number, layer in enumerate(layers):
            stack.enter_context(_watch_layer(layer, number, trace, recorder, current))
        for path, module in decoder.named_modules():
            if id(module) not in inside and path:
                stack.enter_context(_watch_outside(module, path, trace))
        stack.enter_context(_watch_decoder(decoder, trace))
        stack.enter_context(recorder)
        try:
            output = backbone(input_ids=ids, use_cache=False)
        except Exception as error:  # whatever a model that nobody has seen may raise
            raise UnsupportedModelError(
                f"it does not run on token ids alone ({type(error).__name__}: {error!s:.120})"
            ) from error
    trace.logits = output.logits
    return trace


def _tokens(backbone: PreTrainedModel, other_end: bool) -> Tensor:
    words = getattr(backbone.get_input_embeddings(), "weight", None)
    if not isinstance(words, Tensor):
        raise UnsupportedModelError("it has no one table of words, for rows of token ids")
    vocabulary = len(words)
    config = backbone.config.get_text_config(decoder=True)
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    plain = [
        number
        for number in range(vocabulary)
        if not any(number in one if isinstance(one, list) else number == one for one in special)
    ]
    if len(plain) < 3 * ROWS:
        raise UnsupportedModelError(f"its vocabulary of {vocabulary} tokens is too small to probe")
    step = len(plain) // (3 * ROWS)
    chosen = torch.tensor(plain[:: max(step, 1)][: 3 * ROWS]).view(3, ROWS)
    last = chosen[2] if other_end else chosen[1]
    return torch.stack([chosen[0], chosen[0], last], dim=1).to(execution_device(backbone))


@contextmanager
def _as_for_probe(backbone: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and eager attention, and back."""
    modes = [(module, module.training) for module in backbone.modules()]
    configs = {id(c): c for m in backbone.modules() if (c := getattr(m, "config", None))}
    kept = [(c, getattr(c, "_attn_implementation", None)) for c in configs.values()]
    backbone.eval()
    try:
        for config, attention in kept:
            if attention is not None:
                config._attn_implementation = "eager"
        yield
    finally:
        for config, attention in kept:
            if attention is not None:
                config._attn_implementation = attention
        for module, training in modes:
            module.training = training


def _keep(trace: Trace, product: Product, current: list[int]) -> None:
    if current:
        trace.layers[current[-1]].events.append(Event(path="", product=product))


@contextmanager
def _watch_layer(
    layer: nn.Module, number: int, trace: Trace, recorder: ProductRecorder, current: list[int]
) -> Iterator[None]:
    seen = trace.layers[number]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.append(number)
        recorder.begin()
        given = args[0] if args else kwargs.get("hidden_states")
        seen.takes_hidden_states = isinstance(given, Tensor)
        if isinstance(given, Tensor):
            seen.given = given.clone()

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        current.pop()
        seen.output = _first(output)

    with ExitStack() as hooks:
        hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
        for path, module in layer.named_modules():
            if path:
                hooks.enter_context(_watch(module, path, seen.events))
        hooks.enter_context(layer.register_forward_hook(leave))
        yield


@contextmanager
def _watch(module: nn.Module, path: str, events: list[Event]) -> Iterator[None]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        events.append(Event(path=path, given=_first_given(args, kwargs)))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        events.append(Event(path=path, output=_first(output)))

    with (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ):
        yield


@contextmanager
def _watch_outside(module: nn.Module, path: str, trace: Trace) -> Iterator[None]:
    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _first_given(args, kwargs)
        trace.outside.append(Event(path=path, given=given, output=_first(output)))
        trace.outputs[path] = output

    with module.register_forward_hook(leave, with_kwargs=True):
        yield


@contextmanager
def _watch_decoder(decoder: nn.Module, trace: Trace) -> Iterator[None]:
    def leave(_: nn.Module, __: Any, output: Any) -> None:
        trace.last = getattr(output, "last_hidden_state", None)
        if trace.last is None:
            trace.last = _first(output)

    with decoder.register_forward_hook(leave):
        yield


def _first(output: Any) -> Tensor | None:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output.clone() if isinstance(output, Tensor) else None


def _first_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    for part in (*args, *kwargs.values()):
        if isinstance(part, Tensor):
            return part.clone()
    return None
