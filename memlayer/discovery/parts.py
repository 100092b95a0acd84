"""From what a probe saw to the parts of a decoder, or to the reason why there are none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from memlayer.decoders import DecoderDescription, DecoderParts, Projection, describe, find_parts
from memlayer.discovery.matching import (
    Match,
    close_rows,
    distinct,
    knows_positions,
    match,
    same_groups,
    scaling_of,
)
from memlayer.discovery.probe import ROWS, LayerTrace, Trace, run_probe
from memlayer.discovery.products import close
from memlayer.errors import UnsupportedModelError
from memlayer.kv_cache import other_kinds
from memlayer.rotation import rotated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.discovery.probe import Event
    from memlayer.plugins import Plugins


_Attention: TypeAlias = tuple[dict[str, Any], tuple[int, int, int], float]


def parts_of(backbone: PreTrainedModel, plugins: Plugins) -> DecoderParts:
    """Give a backbone's parts: as an adapter describes them, else as they can be found.

    Raises:
        UnsupportedModelError: if no adapter describes the family and its parts cannot be told for
            certain, or the backbone is not what its adapter describes.
        PluginError: if the adapter is not a `DecoderDescription`.
    """
    description = describe(backbone, plugins)
    if description is not None:
        return find_parts(backbone, description)
    try:
        return discover(backbone)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"no decoder adapter for model_type {backbone.config.model_type!r}, and memlayer "
            f"cannot find its parts by itself: {error}; docs/adapters.md shows how to describe a "
            "family"
        ) from error


def discover(backbone: PreTrainedModel) -> DecoderParts:
    """Find a backbone's parts by running a few tokens through it.

    Raises:
        UnsupportedModelError: with the reason, if they cannot be told for certain.
    """
    decoder_path, decoder = _decoder(backbone)
    layers_path, layers = _layers(backbone, decoder)
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        raise UnsupportedModelError("it keeps no cache of keys and values (past_key_values)")
    others = other_kinds(DynamicCache(config=backbone.config))
    if others:
        raise UnsupportedModelError(
            f"layers of its cache hold more than keys and values ({', '.join(others)}): a state "
            "that goes from token to token"
        )
    trace = run_probe(backbone, decoder, layers)
    other = run_probe(backbone, decoder, layers, other_end=True)
    _check_stream(trace, other)
    found = [_attention(number, layer) for number, layer in enumerate(trace.layers)]
    first = found[0]
    for number, (description, sizes, _) in enumerate(found):
        if (description, sizes) != first[:2]:
            raise UnsupportedModelError(f"layer {number} is built otherwise than layer 0")
    final_norm, projection = _ending(trace, decoder)
    heads, key_value_heads, head_dim = first[1]
    described = DecoderDescription(
        decoder=decoder_path,
        layers=layers_path,
        final_norm=_joined(decoder_path, final_norm),
        output_projection=_joined(decoder_path, projection),
        head=None,
        rotary=_joined(decoder_path, _rotary(trace, decoder)),
        **first[0],
    )
    given = trace.layers[0].given
    assert given is not None
    parts = DecoderParts(
        description=described,
        decoder=decoder,
        layers=layers,
        final_norm=_module(decoder, final_norm),
        output_projection=_module(decoder, projection),
        head=None,
        rotary=None if described.rotary is None else backbone.get_submodule(described.rotary),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        hidden_size=given.shape[-1],
        max_positions=_table_size(backbone, decoder, layers, trace),
        scalings=tuple(scaling for _, _, scaling in found),
    )
    return _with_head(backbone, parts, trace)


def _decoder(backbone: PreTrainedModel) -> tuple[str, nn.Module]:
    named = {id(module): path for path, module in backbone.named_modules()}
    words = backbone.get_input_embeddings()
    with_words = [
        child for child in backbone.children() if any(part is words for part in child.modules())
    ]
    for decoder in (backbone.get_decoder(), backbone.base_model, *with_words):
        if (
            isinstance(decoder, nn.Module)
            and decoder is not backbone
            and any(isinstance(module, nn.ModuleList) for module in decoder.modules())
        ):
            return named[id(decoder)], decoder
    raise UnsupportedModelError("none of its modules is a decoder of its own, apart from the head")


def _layers(backbone: PreTrainedModel, decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    depth = getattr(backbone.config.get_text_config(decoder=True), "num_hidden_layers", None)
    if depth is None:
        raise UnsupportedModelError("its configuration names no number of layers")
    inside = {id(module) for module in decoder.modules()}
    lists = [
        (path, module)
        for path, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and id(module) in inside
    ]
    # Lists within layers (experts) may be as long.
    outer = [
        (path, module)
        for path, module in lists
        if not any(path.startswith(other + ".") for other, _ in lists)
    ]
    if len(outer) > 1:
        outer = [(path, module) for path, module in outer if _runs(backbone, module)]
    if len(outer) != 1:
        raise UnsupportedModelError(
            f"its decoder has {len(outer)} lists of {depth} modules, where one was expected: that "
            "of its layers"
        )
    return outer[0]


def _runs(backbone: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Whether text goes through these modules: a tower for images is left alone by it."""
    ran = []
    with layers[0].register_forward_pre_hook(lambda *_: ran.append(True)):
        run_probe(backbone, layers, nn.ModuleList())
    return bool(ran)


def _check_stream(trace: Trace, other: Trace) -> None:
    """Refuse layers that are not one stream of hidden states, read from left to right."""
    for number, (layer, changed) in enumerate(zip(trace.layers, other.layers, strict=True)):
        given, output = layer.given, layer.output
        if not layer.takes_hidden_states or given is None or output is None or given.dim() != 3:
            raise UnsupportedModelError(
                f"layer {number} is not called with hidden states (B, T, E) alone first, or does "
                "not give them"
            )
        if given.shape[1] != trace.ids.shape[1]:
            raise UnsupportedModelError(
                f"layer {number} is called with {given.shape[1]} hidden states for "
                f"{trace.ids.shape[1]} tokens, where one each was expected"
            )
        if number and not close(trace.layers[number - 1].output, given):  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"layer {number} does not get what layer {number - 1} gave: the decoder does more "
                "than pass hidden states on"
            )
        assert changed.output is not None
        if not close(output[:, :-1], changed.output[:, :-1]):
            raise UnsupportedModelError(
                f"layer {number} changes earlier tokens when a later one changes: it is not causal "
                "(is_decoder=False?)"
            )


def _attention(number: int, layer: LayerTrace) -> _Attention:
    """Give one layer's part of the description; H, H_kv and D; and the factor on ``q . k``."""
    places = [place for place, event in enumerate(layer.events) if event.product is not None]
    if len(places) != 1:
        raise UnsupportedModelError(
            f"layer {number} has {len(places)} softmax attentions over its tokens, where one was "
            "expected"
        )
    before, after = layer.events[: places[0]], layer.events[places[0] + 1 :]
    product = layer.events[places[0]].product
    assert product is not None
    assert layer.given is not None
    query = match(product.query, before, (0,))
    key = match(product.key, before, (0,))
    value = match(product.value, before, range(product.value.shape[2]))
    for name, one in (("queries", query), ("keys", key), ("values", value)):
        if one is None:
            raise UnsupportedModelError(
                f"the {name} of layer {number} are not the output of any one of its modules"
            )
        if number == 0 and knows_positions(one, layer.given):
            raise UnsupportedModelError(
                f"the {name} of layer {number} know their position where {one.path!r} gives them: "
                "kept, they would be wrong at any other place"
            )
    assert query is not None
    assert key is not None
    assert value is not None
    heads, head_dim = len(query.heads), product.query.shape[-1]
    kept = [distinct(one.heads) for one in (key, value)]
    if product.value.shape[-1] != head_dim:
        raise UnsupportedModelError(
            f"the values of layer {number} have {product.value.shape[-1]} numbers a head, its keys "
            f"{head_dim}"
        )
    if not all(same_groups(one.heads, len(kept[0])) for one in (key, value)):
        raise UnsupportedModelError(
            f"the query heads of layer {number} do not share its key and value heads evenly"
        )
    scaling = scaling_of(product, query, key)
    if scaling is None:
        raise UnsupportedModelError(
            f"what the softmax of layer {number} gets is not a multiple of queries times keys"
        )
    return (
        _paths(number, query, key, value, kept, _reader(number, product.output, after)),
        (heads, len(kept[0]), head_dim),
        scaling,
    )


def _reader(number: int, output: Tensor, after: Sequence[Event]) -> str:
    """Give the first module that is called with the concatenated heads."""
    joined = output.transpose(1, 2).flatten(2)
    for event in after:
        if event.given is not None and close(joined, event.given):
            return event.path
    raise UnsupportedModelError(
        f"no module of layer {number} is called with what its attention gave: something is done to "
        "it first"
    )


def _paths(
    number: int,
    query: Match,
    key: Match,
    value: Match,
    kept: Sequence[tuple[int, ...]],
    reader: str,
) -> dict[str, Any]:
    """Put the paths into the form of a description: from the module that holds them all."""
    every = [path.split(".")[:-1] for path in (query.path, key.path, value.path, reader)]
    shared = 0
    while all(len(path) > shared for path in every) and len({p[shared] for p in every}) == 1:
        shared += 1

    def below(path: str) -> str:
        return ".".join(path.split(".")[shared:])

    def projection(one: Match, heads: tuple[int, ...]) -> Projection:
        return Projection(module=below(one.path), heads=heads, heads_first=one.heads_first)

    return {
        "attention": ".".join(every[0][:shared]),
        "query": projection(query, query.heads),
        "key": projection(key, kept[0]),
        "value": projection(value, kept[1]),
        "attention_output": below(reader),
    }


def _ending(trace: Trace, decoder: nn.Module) -> tuple[str | None, str | None]:
    """Give the modules between the last layer and the decoder's output: norm, projection."""
    last, end = trace.layers[-1].output, trace.last
    assert last is not None
    if end is not None and close(last, end):
        return None, None
    for event in trace.outside:
        if event.given is None or event.output is None or not close(last, event.given):
            continue
        if end is not None and close(event.output, end):
            if isinstance(decoder.get_submodule(event.path), nn.Linear):
                return None, event.path
            return event.path, None
        for following in trace.outside:
            if (
                following.given is not None
                and following.output is not None
                and end is not None
                and close(event.output, following.given)
                and close(following.output, end)
            ):
                return event.path, following.path
    raise UnsupportedModelError(
        "what its decoder does after its last layer is not one norm, with or without a projection"
    )


def _rotary(trace: Trace, decoder: nn.Module) -> str | None:
    """Give the module of cosines and sines, if turning by them is what the attention did."""
    ((_, product, query),) = _queries(trace.layers[:1])
    for path, output in trace.outputs.items():
        if not (isinstance(output, tuple) and len(output) == 2):
            continue
        module = decoder.get_submodule(path)
        positions = torch.arange(query.shape[2], device=query.device)[None]
        try:
            with torch.no_grad():
                cos, sin = module(query, positions)
            turned = rotated(query, cos, sin)
        except Exception:  # another kind of module, which may raise anything
            continue
        if close_rows(product, turned):
            return path
    return None


def _queries(layers: Sequence[LayerTrace]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give each layer's number, its queries as multiplied, and as projected."""
    for number, layer in enumerate(layers):
        for place, event in enumerate(layer.events):
            if event.product is not None:
                found = match(event.product.query, layer.events[:place], (0,))
                assert found is not None
                yield number, event.product.query, found.operand()


def _table_size(
    backbone: PreTrainedModel, decoder: nn.Module, layers: nn.ModuleList, trace: Trace
) -> int | None:
    """Give the tokens that a table of learned positions holds; None where there is no table.

    A table of words says something else in each row; one of positions does not, whatever it is
    called with (BART's is given the token ids, and looks at their shape only).
    """
    config = backbone.config.get_text_config(decoder=True)
    most: int | None = getattr(config, "max_position_embeddings", None)
    for event in trace.outside:
        module = decoder.get_submodule(event.path)
        weight = getattr(module, "weight", None)
        if (
            most is not None
            and isinstance(module, nn.Embedding)
            and not _differs_by_row(event.output)
            and isinstance(weight, Tensor)
            and weight.shape[0] >= most
        ):
            return most
    return None


def _differs_by_row(output: Tensor | None) -> bool:
    return (
        output is not None
        and output.dim() == 3
        and len(output) == ROWS
        and not output.eq(output[:1]).all()
    )


def _with_head(backbone: PreTrainedModel, parts: DecoderParts, trace: Trace) -> DecoderParts:
    """Check that logits come out right from the last layer's output."""
    from memlayer.head import logits_of

    last = trace.layers[-1].output
    assert last is not None
    assert trace.logits is not None
    with torch.no_grad():
        logits = logits_of(backbone, parts, parts.final_norm(last))
    if not close(trace.logits, logits):
        raise UnsupportedModelError("its logits do not follow from its decoder's output alone")
    return parts


def _joined(decoder: str, path: str | None) -> str | None:
    if path is None:
        return None
    return f"{decoder}.{path}" if decoder else path


def _module(decoder: nn.Module, path: str | None) -> nn.Module:
    return nn.Identity() if path is None else decoder.get_submodule(path)
