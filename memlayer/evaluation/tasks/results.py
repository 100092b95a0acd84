"""What the evaluation of a task gives: a score for each condition, and their differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """The mean of one metric over all items.

    Attributes:
        mean: over items.
        error: its standard error; None for one item.
    """

    mean: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One condition's mean less another's, over the same items.

    Attributes:
        metric: what is compared.
        condition: the condition measured.
        against: what it is compared with.
        difference: of the means.
        low: lower end of the 95 % interval, Student's t over items; None for one item.
        high: upper end.
    """

    metric: str
    condition: str
    against: str
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores of one model on one task.

    Attributes:
        task: its name.
        metrics: what was measured; the first one is the task's own.
        items: how many were scored.
        chance: what guessing gives in the first metric, or None.
        conditions: scores by condition and metric.
        groups: means by group, condition and metric.
        differences: of the conditions with memory to the others, in every metric.
        seconds: of scoring.
        settings: what was asked for.
        notes: what a reader must know.
        per_item: scores by item, condition and metric.
    """

    task: str
    metrics: tuple[str, ...]
    items: int
    chance: float | None
    conditions: Mapping[str, Mapping[str, Score]]
    groups: Mapping[str, Mapping[str, Mapping[str, float]]]
    differences: tuple[Difference, ...]
    seconds: float
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    per_item: Mapping[str, Mapping[str, Mapping[str, float]]]

    def difference(self, condition: str, against: str, metric: str | None = None) -> Difference:
        """Give one comparison, of the first metric if none is named.

        Raises:
            KeyError: if it was not made.
        """
        wanted = (metric or self.metrics[0], condition, against)
        for item in self.differences:
            if (item.metric, item.condition, item.against) == wanted:
                return item
        raise KeyError(wanted)

    def to_dict(self) -> dict[str, Any]:
        """Give the result as JSON types."""
        content = asdict(self)
        content["differences"] = list(content["differences"])
        content["metrics"], content["notes"] = list(self.metrics), list(self.notes)
        return {"format_version": FORMAT_VERSION, **content}
