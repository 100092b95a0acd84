"""What a past costs: bytes that follow from shapes, sides that grow as they should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from memlayer.errors import ConfigError
from memlayer.evaluation.cost import _filled_cache, _same, measure_cost

if TYPE_CHECKING:
    from memlayer.evaluation.cost import Cost
    from memlayer.model import LongMemModel

SEGMENT = 32


def by_condition(costs: tuple[Cost, ...], past: int) -> dict[str, Cost]:
    return {cost.condition: cost for cost in costs if cost.past == past}


def test_bytes_are_those_of_the_cache_and_of_the_bank(model: LongMemModel) -> None:
    result = measure_cost(model, (64, 32), segment_length=SEGMENT, rounds=2)
    assert [cost.past for cost in result.costs] == [32] * 3 + [64] * 3
    parts, layers = model.parts, len(model.parts.layers)
    for past in (32, 64):
        costs = by_condition(result.costs, past)
        vector = parts.num_key_value_heads * parts.head_dim * 4
        assert costs["backbone"].bytes == 0
        assert costs["dense"].bytes == 2 * layers * past * vector
        # Keys and values of one memory layer, and a key a chunk; a ring has some slack.
        held = 2 * past * vector + past // model.memory_config.chunk_size * vector
        assert held <= costs["memory"].bytes <= 4 * held
        for cost in costs.values():
            assert 0 < cost.seconds.low <= cost.seconds.median <= cost.seconds.high
    assert result.notes == ()
    assert result.to_dict()["costs"][0]["condition"] == "backbone"


def test_the_model_is_as_before(model: LongMemModel) -> None:
    model.train()
    model.memorize(torch.arange(1, 41).unsqueeze(0))
    before = len(model.memory)
    measure_cost(model, (32,), segment_length=SEGMENT, rounds=1)
    assert len(model.memory) == before
    assert model.training


def test_a_cache_that_grew_left_its_tensors_as_they_were(model: LongMemModel) -> None:
    ids = torch.arange(1, 1 + SEGMENT).unsqueeze(0)
    with torch.inference_mode():
        cache = _filled_cache(model, ids, 64)
        for _ in range(2):
            assert cache.get_seq_length() == 64
            model.backbone(input_ids=ids, past_key_values=_same(cache))


def test_dense_context_ends_where_the_positions_do(model: LongMemModel) -> None:
    longest = model.backbone.config.max_position_embeddings
    past = longest // SEGMENT * SEGMENT
    result = measure_cost(model, (past,), segment_length=SEGMENT, rounds=1)
    assert set(by_condition(result.costs, past)) == {"backbone", "memory"}
    assert result.notes == (
        f"no dense context from {past} tokens: the backbone has {longest} positions",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pasts": (48,)}, "pasts must be multiples of the segment's 32 tokens.* got 48"),
        ({"pasts": (0,)}, "pasts must be multiples of the segment's 32 tokens.* got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    model: LongMemModel, changes: dict[str, object], message: str
) -> None:
    call = {"pasts": (32,), "segment_length": SEGMENT, "rounds": 1, **changes}
    with pytest.raises(ConfigError, match=message):
        measure_cost(model, **call)
