"""Tiny wrapped models in which memory makes a difference, and documents of random tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

import memlayer
from memlayer.data import TokenDocument

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from memlayer.model import LongMemModel


@pytest.fixture(params=["gpt2", "opt", "llama"])
def any_backbone(
    request: pytest.FixtureRequest, make_backbone: Callable[..., PreTrainedModel]
) -> PreTrainedModel:
    return make_backbone(request.param)


@pytest.fixture
def backbone(make_backbone: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_backbone("llama")


@pytest.fixture
def make_model(
    as_trained: Callable[..., LongMemModel],
) -> Callable[[PreTrainedModel], LongMemModel]:
    """Wrap, and move every trainable weight: gates and layer scales would be 0."""

    def make(backbone: PreTrainedModel) -> LongMemModel:
        config = memlayer.LongMemConfig(
            backend="torch", memory_size=256, chunk_size=4, top_k=8, segment_length=16
        )
        return as_trained(memlayer.wrap(backbone, config).eval(), by=0.2, seed=1)

    return make


@pytest.fixture
def model(
    backbone: PreTrainedModel, make_model: Callable[[PreTrainedModel], LongMemModel]
) -> LongMemModel:
    return make_model(backbone)


@pytest.fixture
def make_document(make_tokens: Callable[..., torch.Tensor]) -> Callable[..., TokenDocument]:
    def make(tokens: int, *, name: str = "a", seed: int = 0) -> TokenDocument:
        ids = make_tokens(1, tokens, seed)[0]
        return TokenDocument(id=name, input_ids=ids, n_bytes=4 * tokens, n_words=tokens)

    return make
