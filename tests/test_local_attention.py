"""The denominator of a layer's own softmax, and one softmax over local and retrieved tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from memlayer import local_attention
from memlayer.attention import fuse, memory_share
from memlayer.local_attention import AttentionWatch


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seen(query, key, **options):
    """Run attention, and give the call as it was seen."""
    with AttentionWatch() as watch:
        functional.scaled_dot_product_attention(query, key, torch.ones_like(key), **options)
    return watch.call


def plain_log_mass(query, key, mask, scaling):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * scaling
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
        scores = scores + (hidden if mask.dtype == torch.bool else mask)
    return torch.logsumexp(scores, dim=-1)


def causal(tokens, keys):
    return torch.ones(tokens, keys, dtype=torch.bool).tril()


MASKS = {
    "none": ({}, None),
    "causal": ({"is_causal": True}, causal(7, 7)),
    "bool": ({"attn_mask": causal(7, 7)[None, None]}, causal(7, 7)),
    "of rows": ({"attn_mask": draw(2, 1, 7, 7, seed=7) > -1}, draw(2, 1, 7, 7, seed=7) > -1),
    "added, of heads": ({"attn_mask": draw(1, 4, 7, 7, seed=8)}, None),
}


@pytest.mark.parametrize("block_bytes", [1, 500, 2**20])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("kind", MASKS)
def test_log_mass_and_its_gradients_equal_the_plain_form(kind, heads, block_bytes, monkeypatch):
    monkeypatch.setitem(local_attention._BLOCK_BYTES, "cpu", block_bytes)
    options, mask = MASKS[kind]
    query = draw(2, 4, 7, 8, seed=1).requires_grad_()
    key = draw(2, heads, 7, 8, seed=2).requires_grad_()
    mass = seen(query, key, **options, scale=0.3, enable_gqa=heads < 4).log_mass()
    if kind == "added, of heads":
        scores = query @ key.repeat_interleave(4 // heads, dim=1).mT * 0.3 + options["attn_mask"]
        expected = torch.logsumexp(scores, dim=-1)
    else:
        expected = plain_log_mass(query, key, mask, 0.3)
    torch.testing.assert_close(mass, expected, rtol=1e-12, atol=1e-12)
    upstream = draw(2, 4, 7, seed=3)
    torch.testing.assert_close(
        torch.autograd.grad(mass, (query, key), upstream),
        torch.autograd.grad(expected, (query, key), upstream),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gradients_are_those_of_the_function():
    query, key = (
        draw(1, 2, 5, 4, seed=1).requires_grad_(),
        draw(1, 1, 5, 4, seed=2).requires_grad_(),
    )
    call = seen(query, key, is_causal=True, enable_gqa=True)
    assert call.scaling == 0.5  # what the function takes if it is given none
    assert torch.autograd.gradcheck(
        lambda q, k: replace(call, query=q, key=k).log_mass(), (query, key)
    )


def test_a_token_that_sees_nothing_has_no_mass_and_no_gradient():
    query = draw(1, 1, 3, 4, seed=1).requires_grad_()
    key = draw(1, 1, 3, 4, seed=2).requires_grad_()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    mass = seen(query, key, attn_mask=mask).log_mass()
    assert mass[0, 0].isneginf().tolist() == [False, True, False]
    gradients = torch.autograd.grad(
        mass[0, 0, [0, 2]].sum() + 0 * mass[0, 0, 1].exp(), (query, key)
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(gradients[0][0, 0, 1], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(autocast):
    query, key = draw(1, 2, 5, 4, seed=1).bfloat16(), draw(1, 2, 5, 4, seed=2).bfloat16()
    with torch.autocast("cpu", enabled=autocast):
        mass = seen(query, key, is_causal=True).log_mass()
    assert mass.dtype == torch.float32
    expected = plain_log_mass(query.double(), key.double(), causal(5, 5), 0.5)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_watched_call_gives_what_it_always_gives_and_the_last_one_counts():
    first, second = draw(1, 2, 5, 4, seed=1), draw(1, 2, 5, 4, seed=2)
    expected = functional.scaled_dot_product_attention(second, first, first, is_causal=True)
    with AttentionWatch() as watch:
        assert watch.call is None
        functional.scaled_dot_product_attention(first, first, first)
        given = functional.scaled_dot_product_attention(second, first, first, is_causal=True)
    assert torch.equal(given, expected)
    assert watch.call.query is second
    assert watch.call.causal


def test_sharing_by_the_masses_is_one_softmax_over_everything():
    query, key, value = draw(1, 2, 5, 4, seed=1), draw(1, 2, 5, 4, seed=2), draw(1, 2, 5, 4, seed=3)
    other_key, other_value = draw(1, 2, 9, 4, seed=4), draw(1, 2, 9, 4, seed=5)
    gate = torch.tensor([-1.0, 0.7])
    with AttentionWatch() as watch:
        local = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = query @ other_key.mT * 0.5
    memory = torch.softmax(scores, dim=-1) @ other_value
    advantage = torch.logsumexp(scores, dim=-1) - watch.call.log_mass()
    share = memory_share(gate, torch.ones(1, 2, 5, dtype=torch.bool), advantage)
    within = (query @ key.mT * 0.5).masked_fill(~causal(5, 5), -torch.inf)
    together = torch.cat([within, scores + gate.double().view(1, 2, 1, 1)], dim=-1)
    expected = torch.softmax(together, dim=-1) @ torch.cat([value, other_value], dim=-2)
    torch.testing.assert_close(fuse(local, memory, share), expected)
