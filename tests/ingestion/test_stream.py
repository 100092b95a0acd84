"""Text in whatever pieces gives one memory, and every stored token knows where it came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlayer
from memlayer.errors import ConfigError, ShapeError

SEGMENT = 16


@pytest.fixture(scope="module")
def wrap(make_backbone):
    def make(family="llama", **changes):
        values = {
            "backend": "torch",
            "memory_size": 400,
            "top_k": 16,
            "segment_length": SEGMENT,
            "memory_layers": (1, 2),
        }
        return memlayer.wrap(make_backbone(family), memlayer.LongMemConfig(**(values | changes)))

    return make


@pytest.fixture(scope="module")
def model(wrap):
    return wrap()


def contents(bank):
    """Every held token of every row, waiting ones included: keys, values, sources."""
    ring, waiting = bank._ring, bank._waiting
    kept = ring.read(ring.written - bank._held_chunks(), ring.written)
    rows = []
    for row in range(bank.rows):
        count, rest = int(kept.counts[row]), int(waiting.lengths[row])
        rows.append(
            [
                torch.cat([chunks[:, row, :, :count].flatten(2, 3), tail[:, row, :, :rest]], dim=2)
                for chunks, tail in ((kept.keys, waiting.keys), (kept.values, waiting.values))
            ]
            + [torch.cat([kept.sources[row, :count].flatten(0, 1), waiting.sources[row, :rest]])]
        )
    return rows


def assert_same_memory(mine, expected):
    assert torch.equal(mine.lengths, expected.lengths)
    for one, other in zip(contents(mine), contents(expected), strict=True):
        for a, b in zip(one, other, strict=True):
            # Batches of other shapes sum in another order.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def memorized(model, feed):
    """A new memory, filled by ``feed(model)``."""
    before, model.memory = model.memory, model.new_memory()
    try:
        feed(model)
        return model.memory
    finally:
        model.memory = before


def feed_row(ids, document=None):
    return lambda model: model.memorize(ids.unsqueeze(0), document=document)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral"])
@pytest.mark.parametrize("piece", [1, 7, SEGMENT, 3 * SEGMENT + 5])
def test_equal_pieces_of_any_length_give_the_memory_of_the_whole(wrap, make_tokens, family, piece):
    model, ids = wrap(family), make_tokens(2, 100)
    whole = memorized(model, lambda model: model.memorize(ids, document="a"))

    def calls(model):
        for part in ids.split(piece, dim=1):
            model.memorize(part, document="a")

    assert_same_memory(memorized(model, calls), whole)
    pieces = memorized(model, lambda model: model.memorize(iter(ids.split(piece, 1)), document="a"))
    assert_same_memory(pieces, whole)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_split_with_any_padding_gives_the_memory_of_each_row_alone(model, make_tokens, data):
    texts = [
        make_tokens(1, data.draw(st.integers(0, 90), label="length"), seed=row)[0]
        for row in range(3)
    ]
    alone = [memorized(model, feed_row(ids, f"text {row}")) for row, ids in enumerate(texts)]
    left = [len(ids) for ids in texts]

    def calls(model):
        while any(left):
            taken = [data.draw(st.integers(0, min(count, 40)), label="taken") for count in left]
            taken = taken if any(taken) else left.copy()
            width = max(taken) + data.draw(st.integers(0, 2), label="more padding")
            ids = torch.full((3, width), 96)
            mask = torch.zeros(3, width, dtype=torch.int64)
            for row, count in enumerate(taken):
                begin = width - count if data.draw(st.booleans(), label="padded left") else 0
                start = len(texts[row]) - left[row]
                ids[row, begin : begin + count] = texts[row][start : start + count]
                mask[row, begin : begin + count] = 1
                left[row] -= count
            model.memorize(ids, mask, document=[f"text {row}" for row in range(3)])

    together = memorized(model, calls)
    if not together.rows:
        assert not any(len(ids) for ids in texts)
        return
    for row, (bank, got) in enumerate(zip(alone, contents(together), strict=True)):
        expected = contents(bank)[0] if bank.rows else None
        if expected is None:
            assert together.lengths[row] == 0
            continue
        for a, b in zip(got[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[2][:, [0, 2]], expected[2][:, [0, 2]])
        assert (got[2][:, 1] == row).all()


def test_nothing_is_computed_twice_within_one_call(model, make_tokens, monkeypatch):
    from memlayer.ingestion import stream

    computed, compute = [], stream.run_to_memory_layers

    def counting(parts, layers, **inputs):
        computed.append(inputs["input_ids"].numel())
        return compute(parts, layers, **inputs)

    monkeypatch.setattr(stream, "run_to_memory_layers", counting)
    ids = make_tokens(1, 100)
    memorized(model, lambda model: model.memorize(iter(ids.split(3, dim=1))))
    assert sum(computed) == 100
    computed.clear()

    def calls(model):
        model.memorize(ids[:, :90])
        model.memorize(ids[:, 90:])

    memorized(model, calls)
    # The second call begins with the 10 tokens of the segment that the first left open.
    assert sum(computed) == 110


def test_an_iterator_is_read_no_further_than_a_segment_ahead(model, make_tokens):
    taken = []

    def pieces():
        for part in make_tokens(1, 96).split(8, dim=1):
            taken.append(len(model.memory))
            yield part

    memorized(model, lambda model: model.memorize(pieces()))
    assert taken == [SEGMENT * (number // 2) for number in range(12)]


def test_what_was_read_before_an_iterator_failed_stays_memorized(model, make_tokens):
    def pieces():
        yield make_tokens(1, 40)
        raise RuntimeError("the disk is gone")

    def feed(model):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            model.memorize(pieces())
        model.memorize(make_tokens(1, 40)[:, 32:])

    expected = memorized(model, feed_row(make_tokens(1, 40)[0]))
    assert_same_memory(memorized(model, feed), expected)


def test_every_stored_token_knows_its_text_document_and_offset(wrap, make_tokens):
    model = wrap(memory_size=64)
    first, second = make_tokens(1, 50, seed=1), make_tokens(1, 43, seed=2)
    model.memorize(first, document="first")
    model.memorize(second[:, :20], document="second")
    model.memorize(second[:, 20:], document="second")
    assert model.memory.documents == ["first", "second"]
    sources = contents(model.memory)[0][2]
    ids = torch.cat([first[0], second[0]])
    offsets = torch.cat([torch.arange(50), torch.arange(43)])
    documents = (torch.arange(93) >= 50).long()
    expected = torch.stack([ids, documents, offsets], dim=1)
    # 64 tokens in whole chunks and one that waits.
    assert torch.equal(sources, expected[-65:])


def test_another_document_begins_a_segment_and_offsets_from_zero(model, make_tokens):
    ids = make_tokens(1, 60)

    def feed(model):
        model.memorize(ids[:, :21], document="a")
        model.memorize(ids[:, 21:], document="b")

    keys, _, sources = contents(memorized(model, feed))[0]
    alone = contents(memorized(model, feed_row(ids[0, 21:])))[0]
    torch.testing.assert_close(keys[:, :, 21:], alone[0], rtol=1e-5, atol=1e-5)
    assert sources[:, 2].tolist() == [*range(21), *range(39)]
    assert sources[:, 1].tolist() == [0] * 21 + [1] * 39


def test_rows_read_documents_of_their_own_and_none_continues(model, make_tokens):
    ids = make_tokens(2, 12)

    def feed(model):
        model.memorize(ids, document=["a", None])
        model.memorize(ids)
        model.memorize(ids, document=[None, "c"])

    memory = memorized(model, feed)
    first, second = (sources for _, _, sources in contents(memory))
    assert memory.documents == ["a", "c"]
    assert first[:, 1].tolist() == [0] * 36
    assert first[:, 2].tolist() == list(range(36))
    assert second[:, 1].tolist() == [-1] * 24 + [1] * 12
    assert second[:, 2].tolist() == [*range(24), *range(12)]


def test_without_text_offsets_are_kept_and_token_ids_are_not(model, make_tokens):
    ids = make_tokens(1, 20)
    memory = memorized(model, lambda model: model.memorize(ids, document="a", keep_text=False))
    sources = contents(memory)[0][2]
    assert (sources[:, 0] == -1).all()
    assert sources[:, 2].tolist() == list(range(20))


@torch.no_grad()
def test_a_direct_write_ends_the_open_segments_of_the_rows_that_it_writes(wrap, make_tokens):
    ids = make_tokens(2, 24)
    mask = torch.tensor([[1] * 8, [0] * 8])
    model = wrap()
    model.memorize(ids[:, :8])
    model(ids[:, 8:16], attention_mask=mask, update_memory=True)
    model.memorize(ids[:, 16:])
    keys = [row[0] for row in contents(model.memory)]
    fresh = contents(memorized(model, feed_row(ids[0, 16:])))[0][0]
    going_on = contents(memorized(model, feed_row(torch.cat([ids[1, :8], ids[1, 16:]]))))[0][0]
    torch.testing.assert_close(keys[0][:, :, 16:], fresh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys[1], going_on, rtol=1e-5, atol=1e-5)


def test_a_cleared_row_begins_afresh_and_the_others_go_on(wrap, make_tokens):
    model, ids = wrap(), make_tokens(2, 20)
    model.memorize(ids[:, :10], document="a")
    model.memory.clear([0])
    model.memorize(ids[:, 10:])
    first, second = contents(model.memory)
    assert first[2][:, 1:].tolist() == [[-1, offset] for offset in range(10)]
    assert second[2][:, 1:].tolist() == [[0, offset] for offset in range(20)]


def test_a_shared_memory_takes_each_batch_rows_segments(wrap, make_tokens):
    model, ids = wrap(memory_scope="batch"), make_tokens(2, 2 * SEGMENT)
    for part in ids.split(5, dim=1):
        model.memorize(part, document=["a", "b"])
    _, _, sources = contents(model.memory)[0]
    keys = contents(model.memory)[0][0]
    for row in range(2):
        mine = sources[:, 1] == row
        assert sources[mine][:, 2].tolist() == list(range(2 * SEGMENT))
        alone = contents(memorized(wrap(), feed_row(ids[row])))[0][0]
        torch.testing.assert_close(keys[:, :, mine], alone, rtol=1e-5, atol=1e-5)


def test_wrong_text_is_refused_and_nothing_is_stored(wrap, make_tokens):
    model, ids = wrap(), make_tokens(2, 8)
    for text, message in (
        (ids[0], r"input_ids must have shape \(B, T\), got \(8,\)"),
        ([ids, ids[:1]], "same batch, got one of 1 rows after one of 2"),
        ([[1, 2]], r"must have shape \(B, T\), got \[1, 2\]"),
    ):
        with pytest.raises(ShapeError, match=message):
            model.memorize(text)
    with pytest.raises(ShapeError, match=r"one mask a piece.*got Tensor"):
        model.memorize([ids], torch.ones(2, 8))
    with pytest.raises(ConfigError, match="one for each of 2 rows, got 3"):
        model.memorize(ids, document=["a", "b", "c"])
    with pytest.raises(ConfigError, match="name must be text that is not empty, got ''"):
        model.memorize(ids, document="")
    assert len(model.memory) == 0
