"""How a generated answer is compared with the right ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower the case, and drop punctuation, articles and needless blanks.

    Source:
        SQuAD (arXiv:1606.05250), evaluation.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Give 1 if the text is one of the answers after `normalise`, else 0."""
    return float(any(normalise(text) == normalise(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """Give the largest F1 of the words of the text and of an answer, after `normalise`."""
    return max(_f1(normalise(text).split(), normalise(answer).split()) for answer in answers)


def starts_with(text: str, answers: Sequence[str]) -> float:
    """Give 1 if the text begins with an answer, but for blanks and quotes, else 0."""
    stripped = text.strip().strip("\"'` ").lower()
    return float(any(stripped.startswith(answer.strip().lower()) for answer in answers))


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(right)).values())
    if not common:
        return float(list(said) == list(right))
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall)
