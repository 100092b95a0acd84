"""How one forward reads memory.

A side network reads a `MemoryReader`: a bank of which batch rows may share a row (`BankReader`),
several memories as one (`StackedReader`), or a memory of which only some batch rows ask
(`SelectedRows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from memlayer.memory.retrieved import Retrieved

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory.bank import MemoryBank


class MemoryReader(Protocol):
    """What the side network needs of a memory. Anything of this form can be read."""

    @property
    def is_readable(self) -> bool:
        """Whether there is anything to find; `retrieve` is called only then."""

    def retrieve(self, queries: Tensor, *, layer: int) -> Retrieved:
        """Find the chunks for each query.

        Args:
            queries: ``(B, H, T, D)``, not rotated, not scaled.
            layer: which memory layer, counted from 0.
        """


@dataclass(frozen=True)
class BankReader:
    """A bank as one forward reads it.

    Attributes:
        bank: what is read.
        expand: consecutive batch rows that share a row of the bank.
    """

    bank: MemoryBank
    expand: int = 1

    @property
    def is_readable(self) -> bool:
        """Whether the bank holds a whole chunk."""
        return self.bank.is_readable

    def retrieve(self, queries: Tensor, *, layer: int) -> Retrieved:
        """Find the bank's chunks for each query ``(B, H, T, D)``."""
        return self.bank.retrieve(queries, layer=layer, expand=self.expand)


@dataclass(frozen=True)
class StackedReader:
    """Several memories read as one: each query gets the best chunks of all of them.

    Chunk numbers are those of the memory that a chunk was found in; ages count all of them.

    Attributes:
        readers: for the same batch rows; each was written after those before it.
    """

    readers: Sequence[MemoryReader]

    @property
    def is_readable(self) -> bool:
        """Whether any of them is."""
        return any(reader.is_readable for reader in self.readers)

    def retrieve(self, queries: Tensor, *, layer: int) -> Retrieved:
        """Find the best chunks of all memories for each query ``(B, H, T, D)``."""
        found = [
            reader.retrieve(queries, layer=layer) for reader in self.readers if reader.is_readable
        ]
        best = found[0]
        for other in found[1:]:
            best = _best_of(best, other)
        return best


@dataclass(frozen=True)
class SelectedRows:
    """A memory that is read by some of its batch rows only.

    Attributes:
        reader: for a whole batch.
        rows: ``(b,)``, int64. Which rows of that batch the queries are of.
        batch: B, rows of the whole batch.
    """

    reader: MemoryReader
    rows: Tensor
    batch: int

    @property
    def is_readable(self) -> bool:
        """Whether the whole memory is."""
        return self.reader.is_readable

    def retrieve(self, queries: Tensor, *, layer: int) -> Retrieved:
        """Find the chunks for the queries ``(b, H, T, D)`` of the selected rows."""
        everyone = queries.new_zeros(self.batch, *queries.shape[1:])
        everyone[self.rows] = queries
        return self.reader.retrieve(everyone, layer=layer).select(self.rows)


def _best_of(first: Retrieved, second: Retrieved) -> Retrieved:
    """Keep the best ``n`` chunks of two retrievals for the same queries, the second's the newer."""
    scores = torch.cat([first.scores, second.scores], dim=3)
    best, chosen = scores.topk(first.scores.shape[3], dim=3)
    offset = sum(len(keys) for keys in first.keys)

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other], dim=3).gather(3, chosen)

    return Retrieved(
        ids=pick(first.ids, second.ids),
        scores=best,
        found=pick(first.found, second.found),
        ages=pick(first.ages + second.written.view(-1, 1, 1, 1), second.ages),
        written=first.written + second.written,
        places=pick(first.places, second.places + offset),
        keys=(*first.keys, *second.keys),
        values=(*first.values, *second.values),
        intact=lambda: first.intact() and second.intact(),
    )
