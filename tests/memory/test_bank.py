"""The memory bank against a plain one: lists of tokens, float64, one query at a time."""

from __future__ import annotations

import pytest
import torch

from memlayer.errors import ConfigError, ShapeError
from memlayer.memory import MemoryBank
from memlayer.plugins import default_plugins

HEADS, DIM = 2, 8


def make_bank(*, backend="torch", capacity=48, chunk_size=4, top_k=8, num_layers=1, **settings):
    cls = default_plugins().backends.get(backend)
    return MemoryBank(
        capacity=capacity,
        chunk_size=chunk_size,
        top_k=top_k,
        num_layers=num_layers,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        make_index=settings.pop(
            "make_index", lambda lanes: cls(lanes=lanes, dim=DIM, device="cpu")
        ),
        slack=settings.pop("slack", 32),
        **settings,
    )


def draw(rows, tokens, seed, heads=HEADS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, tokens, DIM, generator=generator)


def draw_mask(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, generator=generator) > 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_a_bank_on_the_gpu_takes_tensors_of_the_gpu_whatever_its_name():
    torch_backend = default_plugins().backends.get("torch")
    for name in ("cuda", "cuda:0"):
        bank = make_bank(
            device=name, make_index=lambda lanes: torch_backend(lanes=lanes, dim=DIM, device="cuda")
        )
        keys = draw(1, 12, seed=0).cuda()
        bank.write((keys,), (keys,))
        found = bank.retrieve(keys, layer=0)
        assert found.found.all()


class PlainBank:
    """What the bank must mean, for one layer."""

    def __init__(self, rows, capacity, chunk_size, overlap=0):
        self.tokens = [[] for _ in range(rows)]
        self.capacity, self.chunk_size, self.overlap = capacity, chunk_size, overlap

    def write(self, keys, values, mask=None):
        for row, kept in enumerate(self.tokens):
            for token in range(keys.shape[2]):
                if mask is None or mask[row, token]:
                    kept.append((keys[row, :, token].double(), values[row, :, token].double()))

    def clear(self, rows):
        for row in rows:
            self.tokens[row] = []

    def retrieve(self, row, head, query, chunks):
        """Give (chunk number, score, keys, values) of the best chunks, best first."""
        whole = max(0, len(self.tokens[row]) - self.overlap) // self.chunk_size
        first = max(0, whole - self.capacity // self.chunk_size)
        found = []
        for number in range(first, whole):
            start = number * self.chunk_size
            chunk = self.tokens[row][start : start + self.chunk_size]
            keys = torch.stack([key[head] for key, _ in chunk])
            values = torch.stack([value[head] for _, value in chunk])
            found.append((number, float(query.double() @ keys.mean(0)), keys, values))
        return sorted(found, key=lambda item: -item[1])[:chunks]


def assert_same_answers(bank, plain, queries):
    got = bank.retrieve(queries)
    keys, values, mask = got.gather()
    rows, heads, tokens, _ = queries.shape
    group, chunks = heads // HEADS, bank.top_k // bank.chunk_size
    for row in range(rows):
        for head in range(heads):
            for token in range(tokens):
                at = (row, head, token)
                expected = plain.retrieve(row, head // group, queries[at], chunks)
                count = len(expected)
                assert got.ids[at].tolist() == [e[0] for e in expected] + [-1] * (chunks - count)
                assert got.found[at].sum() == count
                read = count * bank.chunk_size
                assert mask[at].tolist() == [True] * read + [False] * (mask.shape[-1] - read)
                if not count:
                    continue
                scores = torch.tensor([e[1] for e in expected], dtype=torch.float64)
                torch.testing.assert_close(
                    got.scores[at][:count].double(), scores, rtol=1e-5, atol=1e-5
                )
                for mine, part in ((keys, 2), (values, 3)):
                    plainly = torch.cat([e[part] for e in expected])
                    torch.testing.assert_close(mine[at][:read].double(), plainly, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backend", "storage"), [("torch", "device"), ("torch", "host"), ("faiss", "device")]
)
@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("overlap", [0, 1, 10])
def test_retrieve_agrees_with_a_plain_bank_through_writes_evictions_and_clears(
    chunk_size, backend, storage, overlap
):
    bank = make_bank(
        backend=backend,
        capacity=12 * chunk_size,
        chunk_size=chunk_size,
        top_k=3 * chunk_size,
        storage=storage,
        overlap=overlap,
    )
    plain = PlainBank(3, bank.capacity, chunk_size, overlap)
    for step, tokens in enumerate([1, 7, 16, 5, 40, 2, 33, 9]):
        keys, values = draw(3, tokens, 10 * step), draw(3, tokens, 10 * step + 1)
        mask = draw_mask(3, tokens, step) if step % 2 else None
        bank.write(keys, values, mask)
        plain.write(keys, values, mask)
        if step == 4:
            bank.clear(rows=[1])
            plain.clear([1])
        left = [max(0, len(tokens) - overlap) for tokens in plain.tokens]
        held = [min(n // chunk_size * chunk_size, bank.capacity) + n % chunk_size for n in left]
        assert bank.lengths.tolist() == [min(n, bank.capacity) for n in held]
        assert [bank.tokens_written(row) for row in range(3)] == list(map(len, plain.tokens))
        # Two query heads a key/value head.
        assert_same_answers(bank, plain, draw(3, 3, 100 + step, heads=2 * HEADS))


@pytest.mark.parametrize("writes", [1, 3, 4, 9], ids="{} writes".format)
def test_a_key_retrieves_its_own_value_after_eviction(writes):
    bank = make_bank(capacity=100, chunk_size=1, top_k=1)
    for write in range(writes):
        keys = torch.nn.functional.normalize(draw(2, 30, write), dim=-1)
        bank.write(keys, keys)
    _, values, _ = bank.retrieve(keys).gather()
    torch.testing.assert_close(values.squeeze(3), keys, rtol=0, atol=0)
    assert len(bank) == min(30 * writes, 100)


@pytest.mark.parametrize("overlap", [0, 7])
def test_the_bank_does_not_depend_on_how_the_stream_was_cut(overlap):
    keys, values = draw(2, 61, 0), draw(2, 61, 1)
    queries = draw(2, 5, 2)
    whole = make_bank(overlap=overlap)
    whole.write(keys, values)
    pieces = make_bank(overlap=overlap)
    for part in (slice(0, 1), slice(1, 14), slice(14, 15), slice(15, 57), slice(57, 61)):
        pieces.write(keys[:, :, part], values[:, :, part])
    for mine, expected in zip(
        pieces.retrieve(queries).gather(), whole.retrieve(queries).gather(), strict=True
    ):
        assert torch.equal(mine, expected)
    assert torch.equal(pieces.lengths, whole.lengths)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_is_never_stored(side):
    keys, values = draw(2, 20, 0), draw(2, 20, 1)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, {"left": slice(0, 6), "right": slice(14, 20), "holes": slice(3, 20, 3)}[side]] = False
    padded = make_bank()
    padded.write(keys.masked_fill(~mask[:, None, :, None], 1e6), values, mask)
    alone = make_bank()
    alone.write(keys[1:, :, mask[1]], values[1:, :, mask[1]])
    queries = draw(2, 4, 2)
    assert padded.lengths.tolist() == [20, int(mask[1].sum())]
    for mine, expected in zip(
        padded.retrieve(queries).gather(), alone.retrieve(queries[1:]).gather(), strict=True
    ):
        assert torch.equal(mine[1:], expected)


def test_rows_never_see_each_other():
    keys, values, queries = draw(2, 30, 0), draw(2, 30, 1), draw(2, 4, 2)
    other = keys.clone()
    other[1] = draw(1, 30, 99)[0]
    first, second = make_bank(), make_bank()
    first.write(keys, values)
    second.write(other, values)
    second.clear(rows=[1])
    for mine, expected in zip(
        second.retrieve(queries).gather(), first.retrieve(queries).gather(), strict=True
    ):
        assert torch.equal(mine[0], expected[0])
    assert not second.retrieve(queries).found[1].any()


def test_a_chunk_is_not_retrievable_before_it_is_whole():
    bank = make_bank(chunk_size=4, top_k=4)
    bank.write(draw(1, 3, 0), draw(1, 3, 1))
    assert not bank.is_readable
    assert bank.lengths.tolist() == [3]
    assert not bank.retrieve(draw(1, 2, 2)).found.any()
    bank.write(draw(1, 1, 3), draw(1, 1, 4))
    assert bank.retrieve(draw(1, 2, 2)).found.all()


def test_chunk_keys_are_means_of_unrounded_keys_in_half_precision_storage():
    keys = draw(1, 8, 0)
    bank = make_bank(dtype=torch.float16, top_k=8)
    bank.write(keys[:, :, :3], keys[:, :, :3])
    bank.write(keys[:, :, 3:], keys[:, :, 3:])
    query = draw(1, 1, 1)
    expected = (query.unsqueeze(3) @ keys.unflatten(2, (2, 4)).mean(3).unsqueeze(2).mT).flatten(3)
    got = bank.retrieve(query).scores.squeeze(3)
    torch.testing.assert_close(got, expected.sort(-1, descending=True).values, rtol=0, atol=1e-6)
    assert bank.retrieve(query).gather()[0].dtype == torch.float16


def test_memory_layers_are_searched_apart():
    bank = make_bank(num_layers=2, top_k=4)
    first, second = draw(1, 16, 0), draw(1, 16, 1)
    bank.write([first, second], [first, second])
    for layer, keys in enumerate((first, second)):
        alone = make_bank(top_k=4)
        alone.write(keys, keys)
        query = draw(1, 3, 2)
        assert torch.equal(
            bank.retrieve(query, layer=layer).gather()[0], alone.retrieve(query).gather()[0]
        )


def test_a_shared_bank_holds_the_tokens_of_all_rows():
    keys, values = draw(3, 8, 0), draw(3, 8, 1)
    shared = make_bank(shared=True, top_k=24)
    shared.write(keys, values)
    joined = make_bank(top_k=24)
    joined.write(
        keys.transpose(0, 1).reshape(1, HEADS, 24, DIM),
        values.transpose(0, 1).reshape(1, HEADS, 24, DIM),
    )
    queries = draw(3, 2, 2)
    got = shared.retrieve(queries).gather()[1]
    assert shared.rows == 1
    for row in range(3):
        assert torch.equal(got[row], joined.retrieve(queries[row : row + 1]).gather()[1][0])


def test_a_negative_overlap_is_refused():
    with pytest.raises(ConfigError, match="overlap must be at least 0, got -1"):
        make_bank(overlap=-1)


def test_rows_that_share_a_bank_cannot_overlap():
    with pytest.raises(ConfigError, match="overlap=8 needs a memory for each row, got one that"):
        make_bank(shared=True, overlap=8)


def test_expanded_rows_read_the_memory_of_their_own_row():
    bank = make_bank()
    bank.write(draw(2, 20, 0), draw(2, 20, 1))
    queries = draw(2, 3, 2)
    wide = bank.retrieve(queries.repeat_interleave(3, dim=0), expand=3)
    narrow = bank.retrieve(queries)
    assert torch.equal(wide.ids, narrow.ids.repeat_interleave(3, dim=0))
    assert torch.equal(wide.gather()[0], narrow.gather()[0].repeat_interleave(3, dim=0))


def test_clearing_everything_allows_another_number_of_rows():
    bank = make_bank()
    bank.write(draw(2, 8, 0), draw(2, 8, 1))
    bank.clear()
    assert (len(bank), bank.rows) == (0, 0)
    bank.write(draw(3, 8, 0), draw(3, 8, 1))
    assert bank.rows == 3


def test_nbytes_counts_what_is_stored():
    bank = make_bank(capacity=48, chunk_size=4)
    assert bank.nbytes == 0
    bank.write(draw(2, 48, 0), draw(2, 48, 1))
    # Every token's key and value, a key a chunk, all float32; and the room made for more.
    slots = bank._ring.slots
    assert slots >= 12
    assert bank.nbytes == 2 * slots * HEADS * DIM * 4 * (2 * 4 + 1)


def test_storage_grows_to_capacity_and_slack_and_no_further():
    bank = make_bank(capacity=4096, chunk_size=4, slack=64)
    for step in range(40):
        bank.write(draw(1, 256, step), draw(1, 256, step))
    slots = bank._ring.slots
    assert 1024 < slots <= 1024 + 64 // 4 + 2
    assert len(bank) == 4096


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused_and_nothing_is_stored(bad):
    bank = make_bank()
    bank.write(draw(1, 8, 0), draw(1, 8, 1))
    keys = draw(1, 8, 2)
    keys[0, 1, 3, 2] = bad
    with pytest.raises(ShapeError, match="keys must be finite, got NaN or infinity"):
        bank.write(keys, draw(1, 8, 3))
    assert len(bank) == 8


@pytest.mark.parametrize(
    ("keys", "values", "mask", "message"),
    [
        ((1, 3, 4, 8), (1, 3, 4, 8), None, r"H_kv=2.*got \(1, 3, 4, 8\)"),
        ((1, 2, 4, 8), (1, 2, 5, 8), None, "same shape"),
        ((1, 2, 4, 8), (1, 2, 4, 8), (1, 5), r"mask must have shape .*got \(1, 5\)"),
        ((3, 2, 4, 8), (3, 2, 4, 8), None, "holds 2 rows, got a batch of 3.*clear"),
    ],
)
def test_wrong_shapes_are_refused(keys, values, mask, message):
    bank = make_bank()
    bank.write(draw(2, 8, 0), draw(2, 8, 1))
    with pytest.raises(ShapeError, match=message):
        bank.write(
            torch.zeros(keys), torch.zeros(values), None if mask is None else torch.ones(mask)
        )


def test_other_wrong_input_is_refused():
    bank = make_bank()
    bank.write(draw(2, 8, 0), draw(2, 8, 1))
    with pytest.raises(ShapeError, match="holds 2 rows, got a batch of 3"):
        bank.retrieve(draw(3, 1, 0))
    with pytest.raises(ShapeError, match="multiple of 2 heads of 8, got 3 heads"):
        bank.retrieve(draw(2, 1, 0, heads=3))
    with pytest.raises(ShapeError, match="rows must be within 0 to 1"):
        bank.clear(rows=[2])
    with pytest.raises(ShapeError, match=r"one tensor per memory layer \(1\), got 2"):
        bank.write([draw(2, 1, 0)] * 2, [draw(2, 1, 0)] * 2)
    with pytest.raises(ShapeError, match="floating point"):
        bank.write(torch.zeros(2, 2, 1, 8, dtype=torch.long), torch.zeros(2, 2, 1, 8))
