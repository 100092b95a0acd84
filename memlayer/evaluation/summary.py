"""From the losses of every token to perplexities, places in the window and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer.data.windows import places_in_window
from memlayer.evaluation.results import (
    ConditionScore,
    DocumentScore,
    PositionScore,
    WindowReport,
    recovery,
)
from memlayer.evaluation.scoring import FOREIGN, KNN_LM, KNN_MEMORY
from memlayer.evaluation.statistics import Interval, Method, paired_interval

if TYPE_CHECKING:
    from memlayer.data import TokenDocument

POSITION_BINS = 8
SEGMENTS_PER_BLOCK = 4

# In the order of every table.
_METHODS: tuple[Method, ...] = ("documents", "documents-t", "blocks")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What was measured with one stride.

    Attributes:
        documents: that were scored.
        by_condition: losses ``(tokens - 1,)``, nats, one tensor a document, by condition. There is
            always ``backbone``.
        held: most tokens that the largest memory held when it was read, for every document.
        sizes: tokens of each memory condition, rising.
        segment_length: tokens of a window.
        stride: tokens between the starts of two windows.
    """

    documents: Sequence[TokenDocument]
    by_condition: Mapping[str, Sequence[Tensor]]
    held: Sequence[int]
    sizes: Mapping[str, int]
    segment_length: int
    stride: int

    @cached_property
    def totals(self) -> dict[str, list[float]]:
        """Summed losses of every document, by condition."""
        return {
            name: [float(part.sum(dtype=torch.float64)) for part in parts]
            for name, parts in self.by_condition.items()
        }

    @cached_property
    def tokens(self) -> list[int]:
        """Scored tokens of every document."""
        return [len(part) for part in self.by_condition["backbone"]]


def summarise(losses: Losses, *, resamples: int, seed: int) -> WindowReport:
    """Make the report of one stride.

    Args:
        losses: what was measured.
        resamples: of each bootstrap.
        seed: of the bootstraps.
    """
    return WindowReport(
        stride=losses.stride,
        conditions=_conditions(losses),
        per_document=tuple(_per_document(losses)),
        by_position=tuple(_by_position(losses)),
        intervals=tuple(_intervals(losses, resamples, seed)),
    )


def _conditions(losses: Losses) -> dict[str, ConditionScore]:
    size = sum(document.n_bytes for document in losses.documents)
    mean = {name: sum(parts) / sum(losses.tokens) for name, parts in losses.totals.items()}
    perplexity = {name: math.exp(loss) for name, loss in mean.items()}
    return {
        name: ConditionScore(
            loss=mean[name],
            perplexity=perplexity[name],
            bits_per_byte=sum(losses.totals[name]) / math.log(2) / size,
            memory_size=losses.sizes.get(name, 0),
            recovery=None
            if name in ("backbone", "dense") or "dense" not in perplexity
            else recovery(perplexity["backbone"], perplexity[name], perplexity["dense"]),
        )
        for name in mean
    }


def _per_document(losses: Losses) -> Iterator[DocumentScore]:
    for index, document in enumerate(losses.documents):
        tokens = losses.tokens[index]
        yield DocumentScore(
            id=document.id,
            tokens=tokens,
            bytes=document.n_bytes,
            memory_tokens_held=losses.held[index],
            perplexity={
                name: math.exp(totals[index] / tokens) for name, totals in losses.totals.items()
            },
        )


def _by_position(losses: Losses) -> Iterator[PositionScore]:
    length = losses.segment_length
    places = torch.cat(
        [places_in_window(tokens, length, losses.stride) for tokens in losses.tokens]
    )
    bins = min(POSITION_BINS, length)
    edges = torch.tensor([length * number // bins for number in range(bins + 1)])
    bin_of = torch.bucketize(places, edges, right=True) - 1
    tokens = torch.bincount(bin_of, minlength=bins).tolist()
    totals = {
        name: torch.bincount(bin_of, torch.cat(list(parts)).double(), minlength=bins).tolist()
        for name, parts in losses.by_condition.items()
    }
    for index in range(bins):
        yield PositionScore(
            start=int(edges[index]),
            end=int(edges[index + 1]),
            tokens=tokens[index],
            perplexity={
                name: math.exp(total[index] / tokens[index]) if tokens[index] else None
                for name, total in totals.items()
            },
        )


def _intervals(losses: Losses, resamples: int, seed: int) -> Iterator[Interval]:
    pairs = [(name, "no_memory") for name in losses.sizes]
    if FOREIGN in losses.by_condition:
        pairs += [(FOREIGN, "no_memory"), (list(losses.sizes)[-1], FOREIGN)]
    if KNN_LM in losses.by_condition:
        largest = list(losses.sizes)[-1]
        pairs += [(largest, KNN_LM), (KNN_MEMORY, largest), (KNN_MEMORY, KNN_LM)]
    pairs += [(name, "backbone") for name in losses.by_condition if name != "backbone"]
    block = SEGMENTS_PER_BLOCK * losses.segment_length
    for condition, against in pairs:
        differences = [
            mine.double() - other.double()
            for mine, other in zip(
                losses.by_condition[condition], losses.by_condition[against], strict=True
            )
        ]
        for method in _METHODS:
            units = differences
            if method == "blocks":
                units = [part for whole in differences for part in torch.split(whole, block)]
            yield paired_interval(
                torch.stack([unit.sum() for unit in units]),
                torch.tensor([len(unit) for unit in units], dtype=torch.float64),
                method=method,
                condition=condition,
                against=against,
                resamples=resamples,
                seed=seed,
            )
