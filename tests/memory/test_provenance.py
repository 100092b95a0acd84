"""Each stored token keeps its source, whatever else is written, dropped and cleared."""

from __future__ import annotations

import pytest
import torch

from memlayer.errors import ShapeError
from memlayer.memory import MemoryBank
from memlayer.plugins import default_plugins

DIM = 6


def make_bank(backend="torch", **settings):
    cls = default_plugins().backends.get(backend)
    values = {"capacity": 24, "chunk_size": 4, "top_k": 8, "slack": 8, "num_layers": 1}
    return MemoryBank(
        **(values | settings),
        num_key_value_heads=2,
        head_dim=DIM,
        make_index=lambda lanes: cls(lanes=lanes, dim=DIM, device="cpu"),
    )


def keys_of(offsets):
    """Keys that say which token they belong to: ``(B, 2, T, DIM)``."""
    plane = offsets[:, None, :, None].float()
    return plane.expand(-1, 2, -1, DIM) + torch.arange(DIM) / 8


def write(bank, offsets, mask=None):
    keys = keys_of(offsets)
    bank.document_number("a")
    sources = torch.stack([offsets + 1000, torch.zeros_like(offsets), offsets], dim=2)
    bank.write(keys, keys, mask, sources)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
def test_what_is_retrieved_comes_from_where_its_key_says_after_any_evictions(chunk_size):
    bank = make_bank(capacity=12 * chunk_size, chunk_size=chunk_size, top_k=3 * chunk_size)
    generator = torch.Generator().manual_seed(0)
    written = torch.zeros(2, dtype=torch.int64)
    for step in range(30):
        tokens = int(torch.randint(1, 40, (1,), generator=generator))
        mask = torch.rand(2, tokens, generator=generator) > 0.3
        offsets = written.unsqueeze(1) + mask.cumsum(1) - 1
        write(bank, offsets, mask)
        written += mask.sum(1)
        if step % 7 == 6:
            bank.clear([1])
        queries = torch.randn(2, 4, 3, DIM, generator=generator)
        found = bank.retrieve(queries)
        sources = bank.look_up(found)
        keys, _, mask = found.gather()
        offsets = sources[..., 2].flatten(3)
        # The key itself names its token: (B, H, T, K, D) holds offset + d / 8.
        assert torch.equal(offsets[mask].float(), keys[..., 0][mask])
        assert torch.equal(sources[..., 0].flatten(3)[mask], offsets[mask] + 1000)
        assert (sources.flatten(3, 4)[~mask] == -1).all()


def test_chunks_that_were_dropped_or_never_written_have_no_source():
    bank = make_bank()
    write(bank, torch.arange(44).unsqueeze(0))
    ids = torch.tensor([-1, 0, 4, 5, 10, 11]).view(1, 1, 1, -1)
    offsets = bank.look_up(ids)[0, 0, 0, :, :, 2]
    gone = [-1] * 4
    assert offsets.tolist() == [gone, gone, gone, [20, 21, 22, 23], [40, 41, 42, 43], gone]


def test_beams_look_up_the_row_that_they_read():
    bank = make_bank()
    write(bank, torch.stack([torch.arange(20), torch.arange(100, 120)]))
    ids = torch.ones(6, 1, 1, 1, dtype=torch.int64)
    assert bank.look_up(ids, expand=3)[:, 0, 0, 0, 0, 2].tolist() == [4] * 3 + [104] * 3
    with pytest.raises(ShapeError, match="holds 2 rows, got a batch of 6"):
        bank.look_up(ids)


def test_a_write_without_sources_stores_unknown_ones():
    bank = make_bank()
    keys = keys_of(torch.arange(8).unsqueeze(0))
    bank.write(keys, keys)
    assert (bank.look_up(bank.retrieve(keys[:, :, :2])) == -1).all()


def test_wrong_sources_are_refused_and_nothing_is_stored():
    bank = make_bank()
    keys = keys_of(torch.arange(8).unsqueeze(0))
    for sources, message in (
        (torch.zeros(1, 7, 3, dtype=torch.int64), r"sources must be int64 of .*\(1, 8, 3\), got"),
        (torch.zeros(1, 8, 3), r"sources must be int64 of .*\(1, 8, 3\), got"),
        (torch.zeros(1, 8, 3, dtype=torch.int64), "name one of 0 documents, .* document 0"),
        (torch.full((1, 8, 3), -2), "must be -1 or more .* values from -2"),
    ):
        with pytest.raises(ShapeError, match=message):
            bank.write(keys, keys, None, sources)
    assert len(bank) == 0


def test_a_document_keeps_its_number():
    bank = make_bank()
    assert [bank.document_number(name) for name in ("a", "b", "a")] == [0, 1, 0]
    assert bank.documents == ["a", "b"]
    bank.clear()
    assert bank.documents == []


def test_ages_count_the_chunks_written_since_whatever_was_dropped_cleared_or_shared(
    make_numbered_bank, feed, tmp_path
):
    """Against the offsets that each chunk says it has."""

    def check(bank, queries, newest, **reading):
        found = bank.retrieve(queries, **reading)
        expand = reading.get("expand", 1)
        offsets = bank.look_up(found, expand=expand)[..., -1, 2]
        since = torch.tensor(newest).repeat_interleave(expand).view(-1, 1, 1, 1) - 1 - offsets
        assert found.found.all()
        assert torch.equal(found.ages * 4, since)
        assert torch.equal((found.ages + found.ids + 1)[:, 0, 0, 0], found.written)

    bank = make_numbered_bank(capacity=64)
    queries = torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(3))
    feed(bank, 0, 40, rows=2)
    feed(bank, 40, 120, rows=2)
    check(bank, queries, [120, 120])
    bank.clear(rows=[1])
    feed(bank, 120, 160, rows=2)
    check(bank, queries, [160, 160])
    assert bank.retrieve(queries).written.tolist() == [40, 10]
    check(bank, queries.repeat_interleave(3, dim=0), [160, 160], expand=3)
    bank.save(tmp_path)
    again = make_numbered_bank(capacity=64)
    again.load(tmp_path)
    feed(again, 160, 168, rows=2)
    check(again, queries, [168, 168])
    shared = make_numbered_bank(capacity=64, shared=True)
    feed(shared, 0, 80)
    check(shared, queries, [80, 80])
