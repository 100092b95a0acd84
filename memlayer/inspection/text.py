"""From token ids back to text, with the place of every token in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARTIAL = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 32


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Give the text of token ids as it is: special tokens shown, no space tidied away."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Cut a text into one piece a token; joined, they are the text.

    A character whose bytes are in several tokens belongs to the last of them; the others are empty.
    """
    # What a token adds is the difference of two decodings, since it depends on the tokens before:
    # they decide about a space, or hold the first bytes of its character.
    found: list[str] = []
    start = whole = 0
    before = ""
    for end in range(1, len(ids) + 1):
        after = decode(tokenizer, ids[start:end])
        if after.endswith(_PARTIAL) and end < len(ids):
            found.append("")
            continue
        found.append(after[len(before) :])
        if end - start >= _WINDOW:
            # Decode from the last token but one that ended with a whole character.
            start = whole
            after = decode(tokenizer, ids[start:end])
        before, whole = after, end
    return found


def boundaries(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Give a text, and where each token begins in it; the last number is the text's length."""
    cut = pieces(tokenizer, ids)
    return "".join(cut), list(accumulate((len(piece) for piece in cut), initial=0))
