from __future__ import annotations

import pytest
import torch

from memlayer.inspection.passages import ChunkTotal, PassageMaker


def total(weight: float = 1.0, readers: tuple[int, ...] = (0,)) -> ChunkTotal:
    return ChunkTotal(weight=weight, readers=frozenset(readers))


@pytest.fixture
def make_maker(model, tiny_backbone):
    def make(context: int = 5, memory=None) -> PassageMaker:
        bank = model.memory if memory is None else memory
        return PassageMaker(bank, tiny_backbone.tokenizer, context=context)

    return make


def test_a_chunk_is_marked_in_the_text_around_it(make_maker, texts):
    mill = texts["mill.txt"]
    found = make_maker().chunk(3, total())
    assert (found.document, found.offset) == ("mill.txt", 12)
    assert found.text == mill[7:21]
    ((start, end),) = found.marks
    assert found.text[start:end] == mill[12:16]


def test_text_ends_where_the_document_does(make_maker, texts):
    first = make_maker().chunk(0, total())
    assert first.text == texts["mill.txt"][:9]
    length = len(texts["mill.txt"])
    last = make_maker().chunk(length // 4 - 1, total())
    assert texts["mill.txt"].endswith(last.text)


def test_a_chunk_of_two_documents_is_shown_whole(make_model, remember, tiny_backbone):
    model = make_model()
    remember(model, "abcdef", document="one")
    remember(model, "ghijkl", document="two")
    maker = PassageMaker(model.memory, tiny_backbone.tokenizer, context=2)
    found = maker.chunk(1, total())
    assert (found.document, found.offset) == ("one", 4)
    assert found.text == "cdefghij"
    assert found.marks == ((2, 6),)


def test_marks_count_characters_where_they_are_several_tokens(make_maker, texts):
    ship = texts["<b>ship</b>.txt"]
    before = len(texts["mill.txt"].encode())
    place = before + ship.encode().index("é".encode())
    found = make_maker(context=12).chunk(place // 4, total())
    (mark,) = found.marks
    own = found.text[mark[0] : mark[1]]
    assert "é" in own
    assert own in ship


def test_distance_counts_memory_between_the_passage_and_the_prompt(make_maker, model):
    written = model.memory.tokens_written(0)
    newest = model.memory.chunk_numbers(0)[-1]
    assert make_maker().chunk(newest, total()).distance == written % 4
    assert make_maker().chunk(0, total()).distance == written - 4


def test_what_was_dropped_is_no_context(make_model, remember, tiny_backbone):
    model = make_model(memory_size=32)
    text = "".join(chr(65 + number % 26) for number in range(80))
    remember(model, text, document="letters")
    assert model.memory.chunk_numbers(0) == range(12, 20)
    found = PassageMaker(model.memory, tiny_backbone.tokenizer, context=6).chunk(12, total())
    assert (found.offset, found.text) == (48, text[48:58])


def test_tokens_without_text_have_a_place_and_no_text(make_model, remember, tiny_backbone):
    model = make_model()
    remember(model, "abcdefgh", document="secret", keep_text=False)
    found = PassageMaker(model.memory, tiny_backbone.tokenizer, context=5).chunk(1, total())
    assert (found.document, found.offset, found.text, found.marks) == ("secret", 4, None, ())


def test_keys_written_without_sources_have_neither(make_model, tiny_backbone):
    model = make_model()
    with torch.no_grad():
        model.remember(model.encode(torch.arange(40, 52).view(1, 12)))
    found = PassageMaker(model.memory, tiny_backbone.tokenizer, context=5).chunk(1, total())
    assert (found.document, found.offset, found.text) == (None, -1, None)


def test_documents_without_a_name_are_none(make_model, remember, tiny_backbone):
    model = make_model()
    remember(model, "abcdefgh")
    maker = PassageMaker(model.memory, tiny_backbone.tokenizer, context=5)
    assert maker.documents_of([0, 1]) == [None, None]
    assert maker.chunk(1, total()).text == "abcdefgh"


def test_neighbours_join_the_strongest(make_maker, texts):
    chunks = {3: total(2.0, (0, 1)), 4: total(1.0, (2,)), 10: total(0.5, (3,))}
    first, second = make_maker().strongest(chunks, tokens=9, most=5)
    assert (first.chunks, first.weight, first.readers) == ((3, 4), 3.0, 3)
    mill = texts["mill.txt"]
    assert [first.text[start:end] for start, end in first.marks] == [mill[12:20]]
    assert (second.chunks, second.offset) == ((10,), 40)


def test_what_every_token_reads_comes_last(make_maker):
    everyone = tuple(range(20))
    chunks = {2: total(0.5, everyone), 12: total(0.1, (3,)), 17: total(0.05, (4,))}
    found = make_maker().strongest(chunks, tokens=20, most=3)
    assert [passage.chunks for passage in found] == [(12,), (17,), (2,)]
    assert [passage.chunks for passage in make_maker().strongest(chunks, tokens=20, most=1)] == [
        (12,)
    ]
