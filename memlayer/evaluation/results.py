"""What a perplexity evaluation gives: conditions, documents, places in the window, intervals.

PerplexityResult ── overall (the windows asked for) ─┐
                 └─ fresh (unoverlapped segments) ───┴─► WindowReport
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlayer.evaluation.statistics import Interval

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ConditionScore:
    """How well one condition predicts the scored tokens, all documents pooled.

    Attributes:
        loss: mean over tokens, nats.
        perplexity: ``exp(loss)``.
        bits_per_byte: the same in bits, over the UTF-8 bytes of the text.
        memory_size: tokens that the memory can hold; 0 without memory.
        recovery: share of the gap between backbone and dense context that the condition closes;
            None without dense context, where dense context does not help, and for those two.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    memory_size: int
    recovery: float | None


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """One document's scores.

    Attributes:
        id: of the document.
        tokens: scored.
        bytes: UTF-8, of the text that was evaluated.
        memory_tokens_held: most tokens that the largest memory held when it was read; 0 where the
            document fits in one window, so that its memory is never read.
        perplexity: by condition.
    """

    id: str
    tokens: int
    bytes: int
    memory_tokens_held: int
    perplexity: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PositionScore:
    """Scores of the tokens whose place in their window is in ``[start, end)``.

    Attributes:
        start: fewest tokens of local context.
        end: one more than the most.
        tokens: scored.
        perplexity: by condition; None where no token was scored there.
    """

    start: int
    end: int
    tokens: int
    perplexity: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class WindowReport:
    """All scores for one way of cutting the documents into windows.

    Attributes:
        stride: tokens between the starts of two windows; the segment length for fresh segments.
        conditions: scores by name: ``backbone``, ``no_memory``, ``memory_<size>``,
            ``foreign_memory``, ``knn_lm``, ``knn_memory``, ``dense``.
        per_document: in the order given.
        by_position: bins along the window.
        intervals: of each condition against the backbone, of each memory against ``no_memory``, and
            of the largest against ``foreign_memory`` and ``knn_lm``, and of ``knn_memory`` against
            both of its parts, by every method.
    """

    stride: int
    conditions: Mapping[str, ConditionScore]
    per_document: tuple[DocumentScore, ...]
    by_position: tuple[PositionScore, ...]
    intervals: tuple[Interval, ...]

    def interval(self, condition: str, against: str, method: str) -> Interval:
        """Give the interval of one comparison.

        Raises:
            KeyError: if it was not made.
        """
        for interval in self.intervals:
            if (interval.condition, interval.against, interval.method) == (
                condition,
                against,
                method,
            ):
                return interval
        raise KeyError((condition, against, method))


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """The scores of one model on some documents.

    Attributes:
        headline: the condition whose perplexity stands for the model: memory on, at the largest
            size; without a memory ``no_memory``; without a side network ``backbone``.
        tokens: scored by every condition.
        backend: that searched the memory; None where there was none.
        seconds: wall-clock time of the evaluation.
        overall: scores with the stride asked for.
        fresh: scores in fresh segments, where the stride asked for makes windows overlap.
        settings: what was asked for, defaults resolved.
        notes: what a reader of the numbers must know about them.
    """

    headline: str
    tokens: int
    backend: str | None
    seconds: float
    overall: WindowReport
    fresh: WindowReport | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """Perplexity of the headline condition."""
        return self.overall.conditions[self.headline].perplexity

    @property
    def recovery(self) -> float | None:
        """Share of the gap between backbone and dense context that the headline closes."""
        return self.overall.conditions[self.headline].recovery

    @property
    def memory_tokens(self) -> int:
        """Tokens that the headline condition's memory can hold; 0 without memory."""
        return self.overall.conditions[self.headline].memory_size

    def to_dict(self) -> dict[str, Any]:
        """Give the result as JSON types; the keys are the same whatever the options."""
        return {
            "format_version": FORMAT_VERSION,
            "task": "perplexity",
            "headline": self.headline,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "memory_tokens": self.memory_tokens,
            "backend": self.backend,
            "seconds": self.seconds,
            "recovery": self.recovery,
            **_as_lists(asdict(self.overall)),
            "fresh": None if self.fresh is None else _as_lists(asdict(self.fresh)),
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }


def recovery(local: float, memory: float, dense: float) -> float | None:
    """Give the share of the gap between a short window and dense context that memory closes.

    Args:
        local: perplexity of the backbone in the short window.
        memory: perplexity of the model with memory in the same window.
        dense: perplexity of the backbone with dense context.

    Returns:
        ``(local - memory) / (local - dense)``; None where dense context does not help, since there
        is no gap to close.
    """
    return (local - memory) / (local - dense) if dense < local else None


def _as_lists(report: dict[str, Any]) -> dict[str, Any]:
    return {key: list(item) if isinstance(item, tuple) else item for key, item in report.items()}
