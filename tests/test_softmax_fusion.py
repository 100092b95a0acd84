"""Models whose heads read memory in one softmax with their window (``fusion="softmax"``)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import memlayer
from memlayer.errors import ConfigError
from memlayer.inspection import record_reads
from memlayer.inspection.recording import chunk_shares

SETTINGS = memlayer.LongMemConfig(
    backend="torch",
    segment_length=16,
    memory_size=64,
    top_k=64,
    chunk_size=1,
    memory_layers=(1, 2),
    layer_reduction_factor=1,
    fusion="softmax",
)
FORMS = {
    "copies": SETTINGS,
    "low rank": replace(SETTINGS, side_rank=3),
    "coupled": replace(SETTINGS, coupled=True),
    "beside": replace(SETTINGS, side_init="identity"),
    "recency": replace(SETTINGS, recency_bias=True),
}
FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3")


@pytest.fixture
def model(make_backbone):
    return memlayer.wrap(make_backbone("llama"), SETTINGS).eval()


@torch.no_grad()
def test_a_head_takes_what_one_softmax_gives_to_its_memory(model, make_tokens):
    model.memorize(make_tokens(1, 48, seed=1))
    with record_reads(model) as records:
        model(make_tokens(1, 12))
    assert len(records) == 2
    for record in records.values():
        # Each token decides for itself, and a later one has more window to read.
        assert record.share.std(dim=-1).min() > 1e-3
        assert record.share[..., 0].mean() > record.share[..., -1].mean()


@torch.no_grad()
def test_a_lower_bias_takes_less_and_a_very_low_one_nothing(model, make_tokens):
    model.memorize(make_tokens(1, 48, seed=1))
    ids, shares = make_tokens(1, 12), []
    for bias in (0.0, -1.0, -3.0):
        for gate in model.side_network.gates:
            gate.fill_(bias)
        with record_reads(model) as records:
            model(ids)
        shares.append(records[0].share)
    assert (shares[0] > shares[1]).all()
    assert (shares[1] > shares[2]).all()
    for gate in model.side_network.gates:
        gate.fill_(-40.0)
    with_memory = model(ids).logits
    with model.disable_memory():
        torch.testing.assert_close(with_memory, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_and_with_nothing_to_read_it_is_the_backbone(
    family, form, make_backbone, make_tokens
):
    backbone, ids = make_backbone(family), make_tokens(2, 14)
    expected = backbone(ids).logits
    model = memlayer.wrap(backbone, FORMS[form]).eval()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
    model.memorize(make_tokens(2, 40, seed=1))
    assert not torch.allclose(model(ids).logits, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("form", FORMS)
def test_all_that_trains_learns_and_checkpointing_changes_no_gradient(
    form, make_backbone, make_tokens, as_trained
):
    gradients = []
    for checkpointing in (False, True):
        model = as_trained(memlayer.wrap(make_backbone("qwen3"), FORMS[form]), by=0.05)
        model.memorize(make_tokens(2, 40, seed=1))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = make_tokens(2, 14)
        model(ids, labels=ids).loss.backward()
        gradients.append([weight.grad for weight in model.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_what_is_learnt_is_what_the_function_says(make_backbone, make_tokens, as_trained):
    """The gradients of a gate, a slope, and a query's and a key's weights, against differences."""
    backbone = make_backbone("llama").double()
    settings = replace(SETTINGS, recency_bias=True)
    model = as_trained(memlayer.wrap(backbone, settings)).eval()
    model.memorize(make_tokens(1, 64, seed=1))
    ids = make_tokens(1, 14)

    def loss():  # Hugging Face's own is in float32
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])

    loss().backward()
    attention = model.side_network.layers[1].self_attn
    mixing = model.side_network.gates[0], model.side_network.slopes[0]
    for weight in (*mixing, attention.q_proj.weight, attention.k_proj.weight):
        place = weight.grad.abs().argmax()
        losses = []
        for step in (1e-2, -1e-2):  # LLaMA's norms are in float32 all the same
            with torch.no_grad():
                weight.view(-1)[place] += step
                losses.append(loss().item())
                weight.view(-1)[place] -= step
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx(weight.grad.view(-1)[place].item(), rel=1e-3)


@torch.no_grad()
def test_a_memory_distance_puts_what_was_retrieved_so_far_back(make_backbone, make_tokens):
    ids, past, logits = make_tokens(1, 12), make_tokens(1, 48, seed=1), {}
    for distance in (None, 0, 11, 200):
        settings = replace(SETTINGS, memory_distance=distance)
        model = memlayer.wrap(make_backbone("llama"), settings).eval()
        model.memorize(past)
        logits[distance] = model(ids).logits
    # The first token stands where the window begins, at no distance; the last at 11.
    torch.testing.assert_close(logits[None][:, 0], logits[0][:, 0], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[None], logits[0], atol=1e-4)
    assert not torch.allclose(logits[0], logits[200], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_with_a_steep_recency_bias_only_the_newest_is_read(fusion, make_backbone, make_tokens):
    settings = replace(SETTINGS, fusion=fusion, recency_bias=True, memory_size=4096, top_k=4096)
    model = memlayer.wrap(make_backbone("llama"), settings).eval()
    past, ids = make_tokens(1, 704, seed=1), make_tokens(1, 12)
    newest = make_tokens(1, 16, seed=2)
    logits, ages = [], []
    for slope in (0.0, 400.0):
        for weights in model.side_network.slopes:
            weights.fill_(slope)
        for before in (past, past.flip(1)):
            model.memory.clear()
            model.memorize(before)
            model.memorize(newest)
            with record_reads(model) as records:
                logits.append(model(ids).logits)
            shares = chunk_shares(model, records[0], 0).attention
            ages.append((shares * records[0].retrieved.ages).sum(dim=-1).mean())
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    torch.testing.assert_close(logits[2], logits[3], rtol=0, atol=1e-5)
    assert ages[0] > 200
    assert ages[2] < 1


@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same(make_backbone, make_tokens, as_trained, tmp_path):
    settings = replace(SETTINGS, recency_bias=True)
    model = as_trained(memlayer.wrap(make_backbone("llama"), settings)).eval()
    model.save_pretrained(tmp_path)
    again = memlayer.load(tmp_path, backbone=make_backbone("llama")).eval()
    assert again.memory_config == model.memory_config
    assert again.side_network.slopes[1].abs().min() > 0
    past, ids = make_tokens(1, 48, seed=1), make_tokens(1, 12)
    model.memorize(past)
    again.memorize(past)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_attention_that_cannot_be_looked_at_is_refused(make_backbone, make_tokens):
    eager = make_backbone("llama", attention="eager")
    message = (
        'fusion="softmax" needs attention by torch\'s scaled_dot_product_attention, and llama '
        "runs 'eager' here; load the backbone with attn_implementation=\"sdpa\""
    )
    with pytest.raises(ConfigError, match=message):
        memlayer.wrap(eager, SETTINGS)
    backbone = make_backbone("llama")
    model = memlayer.wrap(backbone, SETTINGS)
    model.memorize(make_tokens(1, 48))
    backbone.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=message):
        model(make_tokens(1, 12))


def test_a_fusion_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="fusion must be one of gate, softmax, got 'sum'"):
        replace(SETTINGS, fusion="sum")
