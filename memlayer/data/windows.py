"""Cut a document into windows so that every token but the first is scored exactly once.

The token at input position p predicts token p + 1. A document of n tokens has n - 1 such positions,
0 ... n - 2, and all of them are scored, whatever the window and the stride:

    window i reads positions [i * S, i * S + T)      T segment length, S stride, 1 <= S <= T
    window 0 scores all of them, a later one those that no window has scored yet: its last S

So a position outside the first window is scored with more than T - S positions before it or equal
to it. With S = T no two windows share a position: the paper's fresh segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The input positions of one forward, and which of them it scores.

    Attributes:
        start: first position that is read.
        score_from: first position that is scored; those before it are context.
        end: one past the last position that is read and scored.
    """

    start: int
    score_from: int
    end: int


def windows(positions: int, segment_length: int, stride: int) -> Iterator[Window]:
    """Give the windows of a document, in order.

    Args:
        positions: input positions to score: the document's tokens less one.
        segment_length: positions that a whole window reads. T.
        stride: positions between the starts of two windows, at most ``segment_length``. S.
    """
    start = scored = 0
    while scored < positions:
        end = min(start + segment_length, positions)
        yield Window(start=start, score_from=scored, end=end)
        start, scored = start + stride, end


def count_windows(positions: int, segment_length: int, stride: int) -> int:
    """Give how many windows `windows` yields: ``1 + ceil((positions - T) / S)``, or 0 for none."""
    if positions < 1:
        return 0
    return 1 + -(-max(positions - segment_length, 0) // stride)


def places_in_window(positions: int, segment_length: int, stride: int) -> Tensor:
    """Give each position's place, from 0, in the window that scores it: ``(positions,)``, int64.

    The place is the number of tokens of local context before the position.
    """
    places = torch.empty(positions, dtype=torch.int64)
    for window in windows(positions, segment_length, stride):
        places[window.score_from : window.end] = torch.arange(
            window.score_from - window.start, window.end - window.start
        )
    return places
