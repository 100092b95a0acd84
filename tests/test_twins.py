"""What side layers that run the backbone's own weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

import memlayer

if TYPE_CHECKING:
    from memlayer.model import LongMemModel

FAMILIES = ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3"]
KINDS = {
    "coupled": {"coupled": True},
    "low rank": {"side_rank": 3},
    "both": {"coupled": True, "side_rank": 3},
}
IDS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("kind", KINDS),
]


def config_of(kind: str) -> memlayer.LongMemConfig:
    return memlayer.LongMemConfig(
        backend="torch",
        segment_length=16,
        memory_size=64,
        top_k=8,
        chunk_size=4,
        memory_layers=(1,),
        layer_reduction_factor=1,
        **KINDS[kind],
    )


def test_untrained_and_without_memory_it_is_the_backbone_bit_for_bit(
    kind: str,
    family: str,
    make_backbone: Callable[..., Any],
    as_trained: Callable[..., LongMemModel],
) -> None:
    backbone = make_backbone(family)
    with torch.no_grad():
        own = backbone(IDS).logits
        model = memlayer.wrap(backbone, config_of(kind))
        assert torch.equal(model(IDS).logits, own)
        model.memorize(IDS)
        assert not torch.allclose(model(IDS).logits, own, atol=1e-3)
        model.memory.clear()
        as_trained(model)
        assert not torch.allclose(model(IDS).logits, own, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, own)


def test_cached_steps_are_one_forward_and_text_is_written(
    kind: str,
    family: str,
    make_backbone: Callable[..., Any],
    as_trained: Callable[..., LongMemModel],
) -> None:
    model = as_trained(memlayer.wrap(make_backbone(family), config_of(kind)))
    model.memorize(IDS)
    with torch.no_grad():
        whole = model(IDS[:, :9]).logits
        output = model(IDS[:, :4], use_cache=True)
        steps = [output.logits]
        for place in range(4, 9):
            output = model(IDS[:, place : place + 1], past_key_values=output.past_key_values)
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
        text = model.generate(IDS[:, :6], max_new_tokens=5, num_beams=2, pad_token_id=0)
    assert text.shape == (2, 11)
