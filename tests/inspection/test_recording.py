from __future__ import annotations

import pytest
import torch

from memlayer.attention import memory_attention, recency_bias
from memlayer.inspection import record_reads
from memlayer.inspection.recording import chunk_shares

IDS = torch.tensor([[40, 41, 42, 50, 60, 61]])


@pytest.fixture(params=["gate", "softmax", "gate, recency", "softmax, recency"])
def recorded(make_model, remember, request):
    """A model with two memory layers, what it recorded, and its logits."""
    fusion, *more = request.param.split(", ")
    made = make_model(
        memory_layers=(1, 3), memory_distance=7, fusion=fusion, recency_bias=bool(more)
    )
    for slope in made.side_network.slopes or ():
        torch.nn.init.constant_(slope, 3.0)
    remember(made, "One two three four five six seven eight nine ten. ")
    with torch.no_grad(), record_reads(made) as records:
        logits = made(input_ids=IDS).logits
    return made, records, logits


def test_a_recorded_reading_gives_the_logits_of_an_unrecorded_one(recorded):
    model, _, logits = recorded
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert torch.equal(logits, expected)


def test_nothing_is_recorded_afterwards(recorded):
    model, records, _ = recorded
    before = dict(records)
    with torch.no_grad():
        model(input_ids=IDS)
    assert records == before
    assert model.side_network.reading.observer is None


def test_every_memory_layer_is_recorded(recorded):
    _, records, _ = recorded
    assert sorted(records) == [0, 1]
    for record in records.values():
        assert record.queries.shape == (1, 2, 6, 8)
        assert record.share.shape == (1, 2, 6)
        assert record.retrieved.ids.shape == (1, 2, 6, 4)


@pytest.mark.parametrize("layer", [0, 1])
def test_shares_are_those_of_the_attention_that_was_run(recorded, layer):
    model, records, _ = recorded
    record = records[layer]
    keys, values, found = record.retrieved.gather()
    query = record.queries
    scores = torch.einsum("bhtkd,bhtd->bhtk", keys, query) * 8**-0.5
    bias, slopes = None, model.side_network.slopes
    if slopes is not None:
        bias = recency_bias(slopes[layer], record.retrieved)
        assert bias.std() > 0.1
        scores = scores + bias.repeat_interleave(4, dim=-1)
    weights = torch.softmax(scores.masked_fill(~found, -torch.inf), dim=-1)
    weighted = weights.unsqueeze(-1) * values
    # The plain way, over all of it at once, gives what the model's own attention gave.
    attended, _ = memory_attention(query, record.retrieved, 8**-0.5, bias)
    torch.testing.assert_close(weighted.sum(dim=-2), attended)
    shares = chunk_shares(model, record, layer)
    by_chunk = weights.unflatten(-1, (-1, 4)).sum(dim=-1)
    torch.testing.assert_close(shares.attention, by_chunk)
    added = weighted.unflatten(-2, (-1, 4)).sum(dim=-2).norm(dim=-1)
    torch.testing.assert_close(shares.contribution, added / added.sum(dim=-1, keepdim=True))


def test_blocks_change_no_share(recorded, monkeypatch):
    model, records, _ = recorded
    whole = chunk_shares(model, records[0], 0)
    monkeypatch.setattr("memlayer.inspection.recording._BLOCK_BYTES", 1)
    blocked = chunk_shares(model, records[0], 0)
    torch.testing.assert_close(blocked.attention, whole.attention)
    torch.testing.assert_close(blocked.contribution, whole.contribution)


def test_what_was_not_found_has_no_share(make_model, remember):
    model = make_model()
    remember(model, "12345678")  # two chunks, where four are asked for
    with torch.no_grad(), record_reads(model) as records:
        model(input_ids=IDS)
    shares = chunk_shares(model, records[0], 0)
    found = records[0].retrieved.found
    assert found.sum(dim=-1).eq(2).all()
    for share in (shares.attention, shares.contribution):
        assert share[~found].eq(0).all()
        torch.testing.assert_close(share.sum(dim=-1), torch.ones(1, 2, 6))
