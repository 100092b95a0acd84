"""Where the reading of each row's text stands: its document, and the segment that is still open.

A segment's keys depend on all of its tokens up to theirs, so text that comes in pieces gives the
same memory as text that comes at once only if the beginning of the open segment is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

NO_TOKENS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowReading:
    """How far one row's text was read.

    Attributes:
        document: number of the document that is being read; -1 if it has no name.
        offset: tokens of it that are memorized.
        open_ids: ``(n,)``, int64, CPU. Memorized tokens of the segment that is not whole yet.
    """

    document: int = -1
    offset: int = 0
    open_ids: Tensor = field(default_factory=lambda: NO_TOKENS)

    def ended(self) -> RowReading:
        """Give the same place, where the next token begins a segment."""
        return replace(self, open_ids=NO_TOKENS)


FRESH = RowReading()
"""A row that has read nothing."""

Reading = tuple[RowReading, ...]
"""One place per row of the batch that is read, also where the rows share one memory."""


def forgotten(reading: Reading, rows: Iterable[int]) -> Reading:
    """Start some rows afresh."""
    chosen = set(rows)
    return tuple(FRESH if row in chosen else place for row, place in enumerate(reading))


def ended(reading: Reading, rows: Iterable[int]) -> Reading:
    """End the open segments of some rows."""
    chosen = set(rows)
    return tuple(place.ended() if row in chosen else place for row, place in enumerate(reading))
