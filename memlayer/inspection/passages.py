"""From chunk numbers to passages: the chunks' own text, and the text around them in memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memlayer.inspection.results import Passage
from memlayer.inspection.text import boundaries

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from memlayer.memory import MemoryBank

_COMPETING = 100


@dataclass(frozen=True, kw_only=True)
class ChunkTotal:
    """What all tokens together read of a chunk."""

    weight: float
    readers: frozenset[int]
    """The tokens that retrieved it."""

    def salience(self, tokens: int) -> float:
        """Give weight x rarity: what every token reads says little about any of them."""
        return self.weight * math.log((tokens + 1) / len(self.readers))


def sum_of(totals: Sequence[ChunkTotal]) -> ChunkTotal:
    """Join what was read of several chunks."""
    return ChunkTotal(
        weight=sum(total.weight for total in totals),
        readers=frozenset().union(*(total.readers for total in totals)),
    )


@dataclass(frozen=True)
class _Source:
    """Where one token of memory came from."""

    chunk: int
    token: int
    document: int
    offset: int

    def goes_on(self, before: _Source) -> bool:
        """Whether it stands right behind another one in the same text."""
        return (self.document, self.offset) == (before.document, before.offset + 1)


class PassageMaker:
    """Shows chunks of a bank of one row as text.

    Args:
        bank: which must not change meanwhile.
        tokenizer: the one whose ids the bank kept.
        context: tokens of text on either side of a chunk.
    """

    def __init__(
        self, bank: MemoryBank, tokenizer: PreTrainedTokenizerBase, *, context: int
    ) -> None:
        self._bank = bank
        self._tokenizer = tokenizer
        self._context = context
        self._reach = -(-context // bank.chunk_size)
        self._known: dict[int, tuple[_Source, ...]] = {}

    def documents_of(self, chunks: Sequence[int]) -> list[str | None]:
        """Name the document of each chunk: that of its first token."""
        self._look_up(chunks)
        return [self._name(self._known[chunk][0]) for chunk in chunks]

    def chunk(self, chunk: int, total: ChunkTotal) -> Passage:
        """Show one chunk in the text around it."""
        return self._show(self._run(chunk), [chunk], total.weight, len(total.readers))

    def prepare(self, chunks: Sequence[int]) -> None:
        """Look up chunks and their surroundings, all at once instead of one by one."""
        reach = range(-self._reach, self._reach + 1)
        self._look_up(sorted({chunk + step for chunk in chunks for step in reach}))

    def strongest(
        self, chunks: Mapping[int, ChunkTotal], *, tokens: int, most: int
    ) -> list[Passage]:
        """Show what was read most, chunks close to a stronger one joined with it.

        Args:
            chunks: every chunk that was retrieved.
            tokens: how many tokens read.
            most: passages wanted.
        """
        left = dict(sorted(chunks.items(), key=lambda item: (-item[1].salience(tokens), item[0])))
        found: list[tuple[ChunkTotal, list[_Source], list[int]]] = []
        # A passage has its neighbours' weight too: many compete, so that the best few of them are
        # the same however many are wanted.
        while left and len(found) < max(_COMPETING, most):
            run = self._run(next(iter(left)))
            inside = sorted({source.chunk for source in run if source.chunk in left})
            found.append((sum_of([left.pop(chunk) for chunk in inside]), run, inside))
        found.sort(key=lambda item: -item[0].salience(tokens))
        return [
            self._show(run, inside, total.weight, len(total.readers))
            for total, run, inside in found[:most]
        ]

    # ---------------------------------------------------------------- parts

    def _run(self, chunk: int) -> list[_Source]:
        """Give a chunk's tokens with the text around, as far as memory has it without a gap."""
        self.prepare([chunk])
        before, after = (
            [source for number in numbers for source in self._known.get(number, ())]
            for numbers in (
                range(chunk - self._reach, chunk),
                range(chunk + 1, chunk + self._reach + 1),
            )
        )
        # A chunk may begin in one document and end in the next: it is shown whole.
        run = list(self._known[chunk])
        for source in before[::-1][: self._context]:
            if not run[0].goes_on(source):
                break
            run.insert(0, source)
        for source in after[: self._context]:
            if not source.goes_on(run[-1]):
                break
            run.append(source)
        return run

    def _show(
        self, run: list[_Source], chunks: Collection[int], weight: float, readers: int
    ) -> Passage:
        first = next(source for source in run if source.chunk in chunks)
        last = max(chunks)
        text: str | None = None
        marks: tuple[tuple[int, int], ...] = ()
        if all(source.token >= 0 for source in run):
            text, starts = boundaries(self._tokenizer, [source.token for source in run])
            marks = _marks([source.chunk in chunks for source in run], starts)
        return Passage(
            chunks=tuple(sorted(chunks)),
            document=self._name(first),
            offset=first.offset,
            distance=self._bank.tokens_written(0) - (last + 1) * self._bank.chunk_size,
            text=text,
            marks=marks,
            weight=weight,
            readers=readers,
        )

    def _name(self, source: _Source) -> str | None:
        return None if source.document < 0 else self._bank.documents[source.document]

    def _look_up(self, chunks: Sequence[int]) -> None:
        held = self._bank.chunk_numbers(0)
        wanted = [chunk for chunk in chunks if chunk in held and chunk not in self._known]
        if not wanted:
            return
        # (1, 1, 1, n) -> (n, C, 3)
        sources: Tensor = self._bank.look_up(torch.tensor(wanted).view(1, 1, 1, -1))[0, 0, 0]
        for chunk, tokens in zip(wanted, sources.tolist(), strict=True):
            self._known[chunk] = tuple(_Source(chunk, *token) for token in tokens)


def _marks(chosen: Sequence[bool], starts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Give the stretches of text of the chosen tokens, neighbours joined."""
    marks: list[tuple[int, int]] = []
    for number, is_chosen in enumerate(chosen):
        start, end = starts[number], starts[number + 1]
        if is_chosen and marks and marks[-1][1] == start:
            marks[-1] = (marks[-1][0], end)
        elif is_chosen:
            marks.append((start, end))
    return tuple(marks)
