"""Compiled layers: the same numbers to rounding, and nothing that memory needs is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import memlayer
from memlayer.compilation import is_compiled
from memlayer.errors import UnsupportedModelError

CONFIG = memlayer.LongMemConfig(
    backend="torch", segment_length=16, memory_size=64, top_k=8, chunk_size=4
)
IDS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(0))

# The kernels are torch's own: what is tested here is what is compiled, and what is not. (A run with
# real ones is in benchmarks/training.py --compile.)
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen3"])
def test_a_compiled_model_computes_the_same_and_reads_the_same_memory(
    family: str, make_backbone: Callable[..., Any]
) -> None:
    found = []
    for compiled in (False, True):
        model = memlayer.wrap(make_backbone(family), CONFIG)
        if compiled:
            model.compile(backend=BACKEND, fullgraph=True)
            sides = [is_compiled(layer) for layer in model.side_network.layers]
            assert sides.count(False) == 1
            assert sum(map(is_compiled, model.parts.layers)) == len(model.parts.layers) - 1
        model.memorize(IDS)
        output = model(IDS[:, :16], labels=IDS[:, :16])
        output.loss.backward()
        gradients = {name: w.grad for name, w in model.side_network.named_parameters()}
        with torch.no_grad(), model.disable_memory():
            without = model(IDS[:, :16]).logits
        found.append((output.logits, without, model.memory._ring.keys, gradients))
    (logits, without, keys, gradients), (others, other_without, other_keys, other) = found
    for mine, given in ((logits, others), (without, other_without), (keys, other_keys)):
        torch.testing.assert_close(given, mine, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, without, atol=1e-2)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4)


def test_disabled_it_is_the_compiled_backbone_and_unwrapped_the_backbone(
    make_backbone: Callable[..., Any],
) -> None:
    backbone = make_backbone("llama")
    with torch.no_grad():
        own = backbone(IDS).logits
        model = memlayer.wrap(backbone, CONFIG)
        model.compile(backend=BACKEND)
        model.memorize(IDS)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, backbone(IDS).logits)
        written = model.generate(IDS[:, :8], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert model.unwrap() is backbone
        assert not any(is_compiled(module) for module in backbone.modules())
        assert torch.equal(backbone(IDS).logits, own)
        plain = memlayer.wrap(backbone, CONFIG)
        plain.memorize(IDS)
        expected = plain.generate(IDS[:, :8], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(written, expected)


def test_side_layers_of_a_compiled_backbone_have_weights_of_their_own(
    make_backbone: Callable[..., Any],
) -> None:
    backbone = make_backbone("llama")
    memlayer.wrap(backbone, CONFIG).compile(backend=BACKEND)
    model = memlayer.wrap(backbone, CONFIG)
    before = model(IDS).logits
    with torch.no_grad():
        for weight in model.side_network.layers.parameters():
            weight.add_(0.1)
    assert not torch.allclose(model(IDS).logits, before, atol=1e-3)


def test_a_copy_of_a_compiled_layer_runs_its_own_weights(make_backbone: Callable[..., Any]) -> None:
    model = memlayer.wrap(make_backbone("llama"), CONFIG)
    layer = model.side_network.layers[0]
    model.compile(backend=BACKEND)
    copied = copy.deepcopy(layer)
    assert is_compiled(copied)
    assert is_compiled(layer)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    call = model.encode(IDS[:, :16]).calls[0]
    hidden = torch.randn(2, 16, model.parts.hidden_size)
    assert torch.equal(copied(hidden, *call.args, **call.kwargs), hidden)
    assert not torch.allclose(layer(hidden, *call.args, **call.kwargs), hidden)


def test_what_somebody_else_compiled_is_refused(make_backbone: Callable[..., Any]) -> None:
    message = "the backbone is compiled, .* wrap it as it is and call model.compile"
    whole = torch.compile(make_backbone("llama"), backend=BACKEND)
    with pytest.raises(UnsupportedModelError, match=message):
        memlayer.wrap(whole, CONFIG)  # type: ignore[arg-type]
    parts = make_backbone("llama")
    parts.model.layers[1].compile(backend=BACKEND)
    with pytest.raises(UnsupportedModelError, match=message):
        memlayer.wrap(parts, CONFIG)
