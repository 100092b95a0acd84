from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch

from memlayer.data import IGNORED, Batch, StreamBatches, TokenDocument
from memlayer.data.windows import windows
from memlayer.errors import ConfigError, DataError

LENGTHS = [37, 5, 12, 2, 16, 17, 9, 33, 8]


def make_documents(lengths: list[int]) -> list[TokenDocument]:
    """Make documents whose tokens are all different, also between documents."""
    starts = itertools.accumulate(lengths, initial=1)
    return [
        TokenDocument(f"d{start}", torch.arange(start, start + length), length, length)
        for start, length in zip(starts, lengths, strict=False)
    ]


def make_stream(lengths: list[int] = LENGTHS, **options: object) -> StreamBatches:
    settings = {"rows": 3, "segment_length": 8, "seed": 4} | options
    return StreamBatches(make_documents(lengths), **settings)  # type: ignore[arg-type]


def read_back(batches: list[Batch], row: int) -> list[list[int]]:
    """Put a row's segments together again, one list of tokens a document."""
    documents: list[list[int]] = [[]]
    for batch in batches:
        documents[-1] += batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
        if batch.ends[row]:
            documents.append([])
    return [document for document in documents if document]


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(vars(left)[name], vars(right)[name]) for name in vars(left))


@pytest.mark.parametrize("stride", [8, 7, 3, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_segments_are_the_windows_of_each_document(rows: int, stride: int) -> None:
    seen: list[list[tuple[list[int], list[int], list[int]]]] = []
    batches = list(make_stream(rows=rows, stride=stride))
    for row in range(rows):
        seen.append([])
        for batch in batches:
            real = batch.attention_mask[row].bool()
            if not real.any():
                continue
            ids, targets, fresh = (
                part[row] for part in (batch.input_ids, batch.targets, batch.fresh)
            )
            scored = targets != IGNORED
            assert torch.equal(targets[scored], ids[scored] + 1)
            seen[-1].append((ids[real].tolist(), ids[scored].tolist(), ids[fresh.bool()].tolist()))
            if batch.ends[row]:
                seen.append([])
    expected = []
    for document in make_documents(LENGTHS):
        ids = document.input_ids.tolist()
        expected.append([])
        last = len(ids) - 1
        for window in windows(last, 8, stride):
            # The document's last token is read where there is room, though it predicts nothing.
            read = ids[window.start : window.start + 8]
            scored = ids[window.score_from : window.end]
            expected[-1].append((read, scored, read[window.score_from - window.start :]))
    assert sorted(document for document in seen if document) == expected


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_every_document_runs_through_one_row_in_order(rows: int) -> None:
    batches = list(make_stream(rows=rows))
    read = [document for row in range(rows) for document in read_back(batches, row)]
    # A last segment of one token is left out: it has nothing to predict.
    expected = [
        item.input_ids.tolist()[: -1 if len(item.input_ids) % 8 == 1 else None]
        for item in make_documents(LENGTHS)
    ]
    assert sorted(read) == expected


def test_every_token_but_a_documents_first_is_a_target_once() -> None:
    targets = torch.cat([batch.targets[batch.targets != IGNORED] for batch in make_stream()])
    expected = torch.cat([document.input_ids[1:] for document in make_documents(LENGTHS)])
    assert torch.equal(targets.sort().values, expected)


def test_a_target_is_the_next_token_also_across_segments() -> None:
    for batch in make_stream():
        scored = batch.targets != IGNORED
        assert torch.equal(batch.targets[scored], batch.input_ids[scored] + 1)


def test_padding_is_on_the_right_and_is_no_target() -> None:
    for batch in make_stream():
        mask = batch.attention_mask
        assert torch.equal(mask, mask.cummin(dim=1).values)
        assert (batch.input_ids[mask == 0] == 0).all()
        assert (batch.targets[mask == 0] == IGNORED).all()


@pytest.mark.parametrize("length", range(2, 26))
def test_no_segment_is_without_targets(length: int) -> None:
    for batch in make_stream([length, 30], rows=2):
        has_tokens = batch.attention_mask.any(dim=1)
        assert torch.equal(has_tokens, (batch.targets != IGNORED).any(dim=1))


def test_a_batch_has_its_documented_shapes_and_dtypes() -> None:
    batch = next(make_stream())
    for tensor in (batch.input_ids, batch.targets, batch.attention_mask, batch.fresh):
        assert tensor.shape == (3, 8)
        assert tensor.dtype == torch.int64
    assert batch.ends.shape == (3,)
    assert batch.ends.dtype == torch.bool


def test_a_free_row_takes_the_next_document_and_is_padding_at_the_end() -> None:
    batches = list(make_stream([8, 40, 16, 8], rows=2, shuffle=False))
    starts = [batch.input_ids[0, 0].item() for batch in batches]
    assert starts == [1, 49, 57, 65, 0]
    assert batches[-1].attention_mask.sum(dim=1).tolist() == [0, 8]
    assert [batch.ends[0].item() for batch in batches] == [True, False, True, True, False]


def test_shuffle_false_keeps_the_order_and_a_seed_decides_another() -> None:
    def order(**options: object) -> list[list[int]]:
        return read_back(list(make_stream(rows=1, **options)), 0)

    plain = order(shuffle=False)
    assert plain == sorted(plain)
    assert order(seed=4) == order(seed=4)
    assert order(seed=4) != order(seed=5)
    assert sorted(order(seed=4)) == plain


def test_repeat_gives_every_document_once_an_epoch_in_a_new_order() -> None:
    stream = make_stream(rows=1, repeat=True)
    epochs = []
    for _ in range(3):
        batches = list(itertools.islice(stream, stream.total_segments))
        epochs.append(read_back(batches, 0))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_repeat_leaves_no_row_empty_even_with_more_rows_than_documents() -> None:
    stream = make_stream([20, 10], rows=5, repeat=True)
    for batch in itertools.islice(stream, 50):
        assert batch.attention_mask.any(dim=1).all()


def test_after_the_end_the_same_batches_come_again() -> None:
    stream = make_stream()
    first, second = list(stream), list(stream)
    assert len(first) == len(second)
    assert all(map(same, first, second))


EXCERPTS = {"excerpt": 20, "lead": 9, "rows": 2}


@pytest.mark.parametrize("options", [{}, {"stride": 5}, EXCERPTS, EXCERPTS | {"stride": 5}])
@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("done", [0, 1, 5, 6])
def test_a_saved_stream_goes_on_with_the_same_batches(
    done: int, repeat: bool, options: dict[str, int]
) -> None:
    stream = make_stream(repeat=repeat, **options)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_stream(repeat=repeat, **options)
    resumed.load_state_dict(state)
    expected = list(itertools.islice(stream, 40))
    following = list(itertools.islice(resumed, 40))
    assert expected
    assert len(following) == len(expected)
    assert all(map(same, following, expected))


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("rows", make_stream(rows=2)),
        ("segment_length", make_stream(segment_length=4)),
        ("stride", make_stream(stride=5)),
        ("excerpt", make_stream(excerpt=9)),
        ("seed", make_stream(seed=5)),
        ("documents", make_stream([*LENGTHS, 8])),
    ],
)
def test_a_saved_stream_refuses_other_settings(name: str, stream: StreamBatches) -> None:
    with pytest.raises(DataError, match=rf"the saved stream has {name}=.*; resume with the docum"):
        stream.load_state_dict(make_stream().state_dict())


def test_a_saved_stream_refuses_another_lead() -> None:
    with pytest.raises(DataError, match="the saved stream has lead=0, this one has 1; resume"):
        make_stream(excerpt=9, lead=1).load_state_dict(make_stream(excerpt=9).state_dict())


def test_a_stream_saved_before_there_were_strides_and_excerpts_goes_on() -> None:
    stream = make_stream()
    next(stream)
    state = stream.state_dict()
    for name in ("stride", "excerpt", "lead"):
        del state["settings"][name]
    state["current"] = [current and current[0] for current in state["current"]]
    resumed = make_stream()
    resumed.load_state_dict(state)
    assert same(next(resumed), next(stream))


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_beyond_the_segment_is_refused(stride: int) -> None:
    message = f"stride must be within 1 and segment_length=8, got {stride}"
    with pytest.raises(ConfigError, match=message):
        make_stream(stride=stride)


@pytest.mark.parametrize("stride", [8, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_excerpt_is_one_piece_of_its_document_and_so_is_what_leads_to_it(
    rows: int, stride: int
) -> None:
    batches = list(make_stream(rows=rows, stride=stride, excerpt=12, lead=9))
    turns: list[tuple[list[int], list[int]]] = []
    for row in range(rows):
        open_turn = None
        for batch in batches:
            lead = batch.lead[row][batch.lead_mask[row].bool()].tolist()
            window = batch.input_ids[row].tolist()
            scored = batch.input_ids[row][batch.targets[row] != IGNORED].tolist()
            if open_turn is None:
                open_turn = (lead, [])
                # Only what was memorized stands before what is scored, and as much as overlaps.
                context = window[: window.index(scored[0])] if scored else []
                assert context == lead[len(lead) - min(len(lead), 8 - stride) :]
            else:
                assert not lead
            open_turn[1].extend(scored)
            if batch.ends[row]:
                turns.append(open_turn)
                open_turn = None
    turns.sort(key=lambda turn: turn[1])
    documents = [document.input_ids.tolist() for document in make_documents(LENGTHS)]
    assert len(turns) == len(documents)
    for (lead, scored), ids in zip(turns, documents, strict=True):
        assert len(scored) == min(len(ids) - 1, 12)
        # All tokens differ and rise by 1: one piece, and within its own document.
        piece = lead + scored
        assert piece == list(range(piece[0], piece[0] + len(piece)))
        assert ids[0] <= piece[0] <= piece[-1] < ids[-1]
        assert len(lead) <= min(9, scored[0] - ids[0])
    assert any(lead for lead, _ in turns)


def test_every_epoch_has_other_excerpts_and_leads_of_all_lengths() -> None:
    stream = make_stream([40], rows=1, excerpt=12, lead=5, repeat=True)
    turns = [batch for batch in itertools.islice(stream, 400) if batch.fresh.any()][::2]
    begins = {int(turn.input_ids[0, 0]) for turn in turns}
    # Tokens are numbered from 1; the last one is no excerpt's, only a target.
    assert begins == set(range(1, 40 - 12 + 1))
    assert {turn.lead.shape[1] for turn in turns} == set(range(6))
    again = make_stream([40], rows=1, excerpt=12, lead=5, repeat=True)
    assert same(next(again), turns[0])


def test_excerpts_are_the_same_with_and_without_a_lead() -> None:
    plain, led = make_stream(excerpt=12), make_stream(excerpt=12, lead=9)
    for left, right in zip(plain, led, strict=True):
        assert torch.equal(left.targets, right.targets)
        assert left.lead.shape == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"excerpt": 7}, "an excerpt must have at least segment_length=8 tokens, got 7"),
        ({"lead": 1}, "lead must be at least 0, and 0 without excerpts, got 1"),
        ({"excerpt": 8, "lead": -1}, "lead must be at least 0, .*, got -1 with excerpt=8"),
    ],
)
def test_excerpts_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_stream(**options)


@pytest.mark.parametrize("options", [{}, {"stride": 5}, {"stride": 1}, {"excerpt": 12}])
def test_total_segments_counts_what_an_epoch_gives(options: dict[str, int]) -> None:
    stream = make_stream(**options)
    given = sum(int(batch.attention_mask.any(dim=1).sum()) for batch in stream)
    assert given == stream.total_segments


def test_documents_that_are_all_shorter_than_a_segment_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        make_stream([300, 200], segment_length=512)
    assert str(caught.value) == (
        "every document is shorter than segment_length=512 tokens (longest: 300); "
        "lower segment_length or give longer documents"
    )


def test_documents_of_one_token_are_skipped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        stream = make_stream([1, 20, 0])
    assert len(stream.documents) == 1
    assert "skipped 2 of 3 documents, which have fewer than 2 tokens" in caplog.text


def test_no_documents_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="there are no documents to stream"):
        make_stream([])


def test_rows_and_segment_length_have_a_minimum() -> None:
    with pytest.raises(ConfigError, match="rows must be at least 1, got 0"):
        make_stream(rows=0)
    with pytest.raises(ConfigError, match="segment_length must be at least 2, got 1"):
        make_stream(segment_length=1)
