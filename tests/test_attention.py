"""Attention over retrieved tokens, against the plain form."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlayer import attention
from memlayer.attention import fuse, memory_attention, memory_share, recency_bias
from memlayer.errors import ShapeError
from memlayer.memory import MemoryBank
from memlayer.plugins import default_plugins


def make_bank(dtype=torch.float64, heads=2, dim=8, **settings):
    cls = default_plugins().backends.get("torch")
    settings = {"capacity": 64, "chunk_size": 4, "top_k": 12, "slack": 16} | settings
    return MemoryBank(
        num_layers=1,
        num_key_value_heads=heads,
        head_dim=dim,
        make_index=lambda lanes: cls(lanes=lanes, dim=dim, device="cpu"),
        dtype=dtype,
        **settings,
    )


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_attention(query, retrieved, scaling, bias=None):
    keys, values, mask = retrieved.gather()
    scores = torch.einsum("bhtd,bhtkd->bhtk", query, keys.to(query.dtype)) * scaling
    if bias is not None:
        scores = scores + bias.repeat_interleave(4, dim=-1)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num()
    attended = torch.einsum("bhtk,bhtkd->bhtd", weights, values.to(query.dtype))
    return attended, torch.logsumexp(scores, dim=-1)


@pytest.fixture
def filled():
    bank = make_bank()
    # Row 1 holds one chunk only, so two of three retrieved chunks are missing there.
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 5:] = False
    bank.write(draw(2, 2, 40, 8, seed=1), draw(2, 2, 40, 8, seed=2), mask)
    return bank


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 5000, 2**24])
def test_memory_attention_and_its_gradients_equal_the_plain_form(
    filled, monkeypatch, block_bytes, biased
):
    monkeypatch.setitem(attention._BLOCK_BYTES, "cpu", block_bytes)
    query = draw(2, 4, 5, 8, seed=3).requires_grad_()
    bias = draw(2, 4, 5, 3, seed=6).requires_grad_()
    retrieved = filled.retrieve(query)
    upstream = draw(2, 4, 5, 8, seed=4), draw(2, 4, 5, seed=5)
    results = []
    for function in (memory_attention, plain_attention):
        outputs = function(query, retrieved, 0.3, bias if biased else None)
        wanted = (query, bias) if biased else (query,)
        results.append((*outputs, *torch.autograd.grad(outputs, wanted, upstream)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_function(filled):
    query = draw(2, 4, 3, 8, seed=3).requires_grad_()
    slope = draw(4, seed=4).requires_grad_()
    retrieved = filled.retrieve(query)
    assert torch.autograd.gradcheck(lambda q: memory_attention(q, retrieved, 0.4), query)
    assert torch.autograd.gradcheck(
        lambda q, r: memory_attention(q, retrieved, 0.4, recency_bias(r, retrieved)),
        (query, slope),
    )


def test_what_is_ten_times_as_old_counts_less_by_the_slope():
    bank = make_bank(capacity=8192, top_k=8192)
    bank.write(draw(1, 2, 8192, 8, seed=1), draw(1, 2, 8192, 8, seed=2))
    retrieved = bank.retrieve(draw(1, 4, 1, 8))
    slope = torch.tensor([0.0, 0.5, 2.0, -1.0], dtype=torch.float64)
    bias = recency_bias(slope, retrieved)
    by_age = torch.zeros(4, 2048, dtype=torch.float64)
    by_age.scatter_(1, retrieved.ages[0, :, 0], bias[0, :, 0])
    # 64 + a is 64, 640 and 6400 tokens: ages of 0, 144 and 1,584 chunks of 4.
    expected = -slope.unsqueeze(1) * torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(by_age[:, [0, 144, 1584]], expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_queries_are_attended_in_float32(filled, autocast):
    query = draw(2, 4, 3, 8, seed=3).bfloat16()
    retrieved = filled.retrieve(query)
    with torch.autocast("cpu", enabled=autocast):
        output, log_mass = memory_attention(query, retrieved, 0.35)
    assert output.dtype == torch.bfloat16
    expected, mass = plain_attention(query.double(), retrieved, 0.35)
    torch.testing.assert_close(log_mass.double(), mass, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.double(), expected, rtol=0.01, atol=0.01)


def test_where_nothing_was_found_the_result_is_zero_even_with_garbage_in_the_bank(filled):
    filled.clear(rows=[1])
    query = draw(2, 4, 3, 8, seed=3).requires_grad_()
    filled._ring.values[:, 1] = 1e30
    output, log_mass = memory_attention(query, filled.retrieve(query), 0.3)
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert log_mass[1].eq(-torch.inf).all()
    assert log_mass[0].isfinite().all()
    (gradient,) = torch.autograd.grad(output.sum(), query)
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert gradient[0].abs().sum() > 0


def test_backward_may_follow_one_update_of_a_full_bank():
    bank = make_bank(capacity=32, slack=16)
    for seed in range(4):
        bank.write(draw(1, 2, 16, 8, seed=seed), draw(1, 2, 16, 8, seed=seed))
    query = draw(1, 2, 6, 8, seed=9).requires_grad_()
    retrieved = bank.retrieve(query)
    expected = torch.autograd.grad(plain_attention(query, retrieved, 0.3)[0].sum(), query)
    output, _ = memory_attention(query, retrieved, 0.3)
    bank.write(draw(1, 2, 16, 8, seed=20), draw(1, 2, 16, 8, seed=21))
    torch.testing.assert_close(torch.autograd.grad(output.sum(), query), expected)


def test_backward_after_two_updates_of_a_full_bank_says_so():
    bank = make_bank(capacity=32, slack=16)
    for seed in range(4):
        bank.write(draw(1, 2, 16, 8, seed=seed), draw(1, 2, 16, 8, seed=seed))
    query = draw(1, 2, 6, 8, seed=9).requires_grad_()
    output, _ = memory_attention(query, bank.retrieve(query), 0.3)
    for seed in (20, 21):
        bank.write(draw(1, 2, 16, 8, seed=seed), draw(1, 2, 16, 8, seed=seed))
    with pytest.raises(ShapeError, match="call backward before the second update"):
        output.sum().backward()


def test_backward_survives_a_cleared_row_and_a_bank_that_grew():
    bank = make_bank(capacity=4096, slack=512)
    bank.write(draw(1, 2, 512, 8, seed=0), draw(1, 2, 512, 8, seed=1))
    query = draw(1, 2, 6, 8, seed=9).requires_grad_()
    retrieved = bank.retrieve(query)
    expected = torch.autograd.grad(plain_attention(query, retrieved, 0.3)[0].sum(), query)
    output, _ = memory_attention(query, retrieved, 0.3)
    bank.clear(rows=[0])
    bank.write(draw(1, 2, 2048, 8, seed=2), draw(1, 2, 2048, 8, seed=3))
    torch.testing.assert_close(torch.autograd.grad(output.sum(), query), expected)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, list | tuple) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
        return output


def test_no_tensor_of_tokens_heads_k_and_d_exists(monkeypatch):
    monkeypatch.setitem(attention._BLOCK_BYTES, "cpu", 2**16)
    bank = make_bank(dtype=torch.float32, dim=16, top_k=64, capacity=512, slack=64)
    keys = draw(1, 2, 512, 16, dtype=torch.float32)
    bank.write(keys, keys)
    query = draw(1, 4, 256, 16, dtype=torch.float32).requires_grad_()
    retrieved = bank.retrieve(query)
    with LargestTensor() as largest:
        memory_attention(query, retrieved, 0.25)[0].sum().backward()
    everything = query.numel() * 64
    # The attention weights (tokens, heads, K) are the largest that is allowed.
    assert largest.numel <= everything // 16


def test_queries_must_be_those_that_were_retrieved_for(filled):
    retrieved = filled.retrieve(draw(2, 4, 5, 8))
    with pytest.raises(ShapeError, match=r"got \(2, 4, 6\) and \(2, 4, 5\)"):
        memory_attention(draw(2, 4, 6, 8), retrieved, 0.3)


def plain_share(gate, shape):
    return torch.sigmoid(gate.double()).view(1, -1, 1).expand(shape)


def test_without_an_advantage_the_share_is_the_sigmoid_of_the_gate():
    gate = torch.tensor([-2.0, 0.0, 3.0])
    share = memory_share(gate, torch.ones(2, 3, 5, dtype=torch.bool))
    torch.testing.assert_close(share.double(), plain_share(gate, (2, 3, 5)))


def test_fuse_mixes_by_the_share():
    local, memory, share = draw(2, 3, 5, 4, seed=1), draw(2, 3, 5, 4, seed=2), draw(2, 3, 5).abs()
    weight = share.unsqueeze(-1)
    torch.testing.assert_close(fuse(local, memory, share), (1 - weight) * local + weight * memory)


@pytest.mark.parametrize("advantage", [None, -torch.inf, torch.inf, torch.nan])
def test_memory_has_no_share_where_nothing_was_found(advantage):
    local, memory = draw(2, 3, 5, 4, seed=1), draw(2, 3, 5, 4, seed=2)
    gate = torch.full((3,), 9.0, requires_grad=True)
    if advantage is not None:
        advantage = torch.full((2, 3, 5), advantage)
    share = memory_share(gate, torch.zeros(2, 3, 5, dtype=torch.bool), advantage)
    fused = fuse(local, memory, share)
    torch.testing.assert_close(fused, local, rtol=0, atol=0)
    fused.sum().backward()
    assert torch.equal(gate.grad, torch.zeros(3))


def test_a_large_gate_still_learns_in_bfloat16():
    gate = torch.full((3,), 7.0, requires_grad=True)
    local, memory = draw(2, 3, 5, 4, seed=1).bfloat16(), draw(2, 3, 5, 4, seed=2).bfloat16()
    fuse(local, memory, memory_share(gate, torch.ones(2, 3, 5).bool())).sum().backward()
    assert (gate.grad != 0).all()


def test_fuse_refuses_other_shapes():
    with pytest.raises(ShapeError, match="same shape"):
        fuse(draw(1, 2, 3, 4), draw(1, 2, 4, 4), torch.ones(1, 2, 3))
