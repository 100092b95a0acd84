from __future__ import annotations

import pytest

from memlayer.inspection.text import boundaries, decode, pieces


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        " two  spaces\n\n",
        "café, naïve",
        "日本語のテキスト" * 9,
        "🙂🙃 mixed 🙂",
        "\ufffd odd",
    ],
)
def test_pieces_join_to_the_text_with_one_piece_a_token(tiny_backbone, text):
    tokenizer = tiny_backbone.tokenizer  # one token a byte
    ids = tokenizer(text).input_ids
    cut = pieces(tokenizer, ids)
    assert "".join(cut) == text
    assert len(cut) == len(ids)


def test_a_character_belongs_to_the_last_of_its_tokens(tiny_backbone):
    ids = tiny_backbone.tokenizer("aé🙂b").input_ids
    assert pieces(tiny_backbone.tokenizer, ids) == ["a", "", "é", "", "", "", "🙂", "b"]


def test_bytes_that_make_no_character_are_shown_as_such(tiny_backbone):
    ids = tiny_backbone.tokenizer("aé").input_ids
    assert "".join(pieces(tiny_backbone.tokenizer, ids[:2])) == "a\ufffd"


def test_special_tokens_and_spaces_are_kept(tiny_backbone):
    ids = tiny_backbone.tokenizer("a , b<end>").input_ids
    assert decode(tiny_backbone.tokenizer, ids) == "a , b<end>"


def test_boundaries_are_where_tokens_begin(tiny_backbone):
    ids = tiny_backbone.tokenizer("né").input_ids
    assert boundaries(tiny_backbone.tokenizer, ids) == ("né", [0, 1, 1, 2])


def test_no_tokens_are_no_text(tiny_backbone):
    assert boundaries(tiny_backbone.tokenizer, []) == ("", [0])
