"""What left the window: sequences share storage, and each sees its own past only."""

from __future__ import annotations

import pytest
import torch

from memlayer.attention import memory_attention
from memlayer.errors import ConfigError
from memlayer.memory import MemoryBank, SelectedRows, StackedReader
from memlayer.memory.readers import BankReader
from memlayer.memory.scratch import ScratchMemory
from memlayer_backends.torch_exact import TorchBackend

LAYERS, HEADS, DIM, CHUNK = 2, 2, 4, 2


def make_scratch(groups=2, sequences=4, capacity=24, top_k=8):
    return ScratchMemory(
        groups=groups,
        sequences=sequences,
        capacity=capacity,
        chunk_size=CHUNK,
        top_k=top_k,
        num_layers=LAYERS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def make_bank(capacity=24, top_k=8):
    return MemoryBank(
        capacity=capacity,
        chunk_size=CHUNK,
        top_k=top_k,
        num_layers=LAYERS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        make_index=lambda lanes: TorchBackend(lanes=lanes, dim=DIM),
    )


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def segments(count, tokens, seed):
    """Give keys and values of some segments, one tensor a layer."""
    both = draw(2, LAYERS, count, HEADS, tokens, DIM, seed=seed)
    return list(both[0]), list(both[1])


def assert_same_answers(mine, expected):
    torch.testing.assert_close(mine.scores, expected.scores)
    keys, values, found = mine.gather()
    other_keys, other_values, other_found = expected.gather()
    assert torch.equal(found, other_found)
    held = mine.found
    assert torch.equal(mine.ages[held], expected.ages[held])
    assert torch.equal(mine.written, expected.written)
    torch.testing.assert_close(keys[found], other_keys[found])
    torch.testing.assert_close(values[found], other_values[found])


def test_each_sequence_finds_what_a_bank_of_its_own_past_finds():
    """Random beams: some write what they share, are reordered, diverge, overflow."""
    generator = torch.Generator().manual_seed(0)
    scratch = make_scratch()
    pasts = [[], [], [], []]
    for step in range(30):
        chosen = torch.randint(2, (4,), generator=generator) + torch.tensor([0, 0, 2, 2])
        scratch.reorder(chosen)
        pasts = [list(pasts[number]) for number in chosen.tolist()]
        # The sequences of a prompt get one segment in common, or one each.
        some = torch.tensor([0, 1, 2, 3] if step % 3 else [2, 3])
        if step % 2:
            unique, segment_of = len(some), torch.arange(len(some))
        else:
            unique = len(some) // 2
            segment_of = torch.arange(unique).repeat_interleave(2)
        keys, values = segments(unique, 4, seed=step)
        scratch.append(keys, values, some, segment_of)
        for sequence, segment in zip(some.tolist(), segment_of.tolist(), strict=True):
            pasts[sequence].append(
                (
                    [k[segment : segment + 1] for k in keys],
                    [v[segment : segment + 1] for v in values],
                )
            )
        queries = draw(4, 4, 3, DIM, seed=100 + step)
        for layer in range(LAYERS):
            found = scratch.retrieve(queries, layer=layer)
            for sequence, past in enumerate(pasts):
                bank = make_bank()
                for piece in past:
                    bank.write(*piece)
                one = torch.tensor([sequence])
                if not past:
                    assert not found.found[sequence].any()
                    continue
                expected = bank.retrieve(queries[one], layer=layer)
                assert_same_answers(found.select(one), expected)
        assert scratch.lengths().tolist() == [min(4 * len(past), 24) for past in pasts]


def test_storage_stays_bounded_and_is_given_back_by_beams_that_lost():
    scratch = make_scratch(groups=1, sequences=2)
    for step in range(200):
        keys, values = segments(2, 4, seed=step)
        scratch.append(keys, values, torch.arange(2), torch.arange(2))
        scratch.reorder(torch.tensor([0, 0]))
    # 12 chunks each sees, the newest of them twice, and room for the next.
    assert scratch.allocated_chunks <= 32


@pytest.fixture
def uninitialized_memory_is_nan():
    """Let PyTorch fill what it allocates without initializing it with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_slots_without_a_chunk_are_finite_since_weight_0_does_not_hide_nan():
    assert torch.empty(3).isnan().all()
    scratch = make_scratch()
    keys, values = segments(1, 4, seed=1)
    scratch.append(keys, values, torch.tensor([2]), torch.tensor([0]))
    queries = draw(4, 4, 3, DIM, seed=2)
    retrieved = scratch.retrieve(queries, layer=0)
    assert retrieved.found.any(dim=-1).tolist() == [[[row == 2] * 3] * 4 for row in range(4)]
    attended, _ = memory_attention(queries, retrieved, 0.5)
    assert attended.isfinite().all()
    assert attended[[0, 1, 3]].eq(0).all()


def test_long_queries_are_searched_in_blocks_with_the_same_answers(monkeypatch):
    scratch = make_scratch()
    keys, values = segments(4, 20, seed=1)
    scratch.append(keys, values, torch.arange(4), torch.arange(4))
    queries = draw(4, 4, 37, DIM, seed=2)
    whole = scratch.retrieve(queries, layer=0)
    monkeypatch.setattr("memlayer.memory.scratch._BLOCK_BYTES", 5_000)
    assert_same_answers(scratch.retrieve(queries, layer=0), whole)


def test_two_memories_read_as_one_give_the_best_of_both():
    bank, scratch, both = make_bank(), make_scratch(groups=2, sequences=2), make_bank(capacity=64)
    for seed, target in ((1, bank), (2, bank), (3, scratch)):
        keys, values = segments(2, 6, seed=seed)
        both.write(keys, values)
        if target is bank:
            bank.write(keys, values)
        else:
            scratch.append(keys, values, torch.arange(2), torch.arange(2))
    queries = draw(2, 4, 5, DIM, seed=4)
    stacked = StackedReader([BankReader(bank), scratch])
    assert_same_answers(stacked.retrieve(queries, layer=1), both.retrieve(queries, layer=1))
    rows = torch.tensor([1])
    some = SelectedRows(stacked, rows, 2).retrieve(queries[rows], layer=1)
    assert_same_answers(some, both.retrieve(queries, layer=1).select(rows))
    assert some.intact()


def test_an_empty_memory_is_left_out_of_a_stack():
    bank, scratch = make_bank(), make_scratch(groups=1, sequences=1)
    stacked = StackedReader([BankReader(bank), scratch])
    assert not stacked.is_readable
    keys, values = segments(1, 6, seed=1)
    scratch.append(keys, values, torch.arange(1), torch.arange(1))
    assert stacked.is_readable
    queries = draw(1, 4, 5, DIM, seed=4)
    retrieved = stacked.retrieve(queries, layer=0)
    assert_same_answers(retrieved, scratch.retrieve(queries, layer=0))
    scratch.append(keys, values, torch.arange(1), torch.arange(1))
    assert retrieved.written.tolist() == [3]
    assert scratch.retrieve(queries, layer=0).written.tolist() == [6]


def test_sequences_of_different_prompts_never_change_places():
    with pytest.raises(ConfigError, match=r"one prompt only \(2 each\), got \[2, 1, 0, 3\]"):
        make_scratch().reorder(torch.tensor([2, 1, 0, 3]))
