"""In-context learning from demonstrations, a few in the window and many in memory.

Source:
    LongMem (arXiv:2306.07174), table 4: 4 or 20 demonstrations in the window, 2,000 in memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memlayer.errors import ConfigError
from memlayer.evaluation.tasks.scores import starts_with
from memlayer.evaluation.tasks.task import Answering, Item, Split, Task, at_least, read_records

LABELS: Mapping[str, tuple[str, ...]] = {
    "sst2": ("positive", "negative"),
    "mr": ("positive", "negative"),
    "subj": ("subjective", "objective"),
    "sst5": ("terrible", "bad", "okay", "good", "great"),
    "mpqa": ("positive", "negative"),
}
"""Label words by data set: those of LongMem's evaluation."""


@dataclass(frozen=True, kw_only=True)
class InContextLearningOptions:
    """Which data sets, and how many demonstrations where.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    datasets: tuple[str, ...] = tuple(LABELS)
    """Of sst2, mr, subj, sst5 and mpqa."""

    shots: int = 20
    """Demonstrations before the question. What the window has no room for goes to memory."""

    cached: int = 2000
    """Demonstrations in memory."""

    seeds: int = 6
    """Drawings of demonstrations; every question is asked under each."""

    greedy: bool = False
    """Decode greedily, and count an answer that begins with the label, as the paper does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "datasets", tuple(self.datasets))
        for name in self.datasets:
            if name not in LABELS:
                raise ConfigError(f"datasets must be of {', '.join(LABELS)}, got {name!r}")
        if not self.datasets:
            raise ConfigError("datasets must name at least one data set")
        at_least("shots", self.shots, 0)
        at_least("cached", self.cached, 0)
        at_least("seeds", self.seeds, 1)
        if not isinstance(self.greedy, bool):
            raise ConfigError(f"greedy must be True or False, got {self.greedy!r}")


class InContextLearning(Task):
    """Sentences of ``icl/{dataset}_{split}.jsonl``; demonstrations from ``_train``.

    The label is the likeliest of the data set's label words; with ``greedy``, what is written. Subj
    asks for a type, all others for a sentiment.
    """

    name = "icl"
    summary = "In-context learning: sentence classification with demonstrations in memory."
    answering: Answering = "choice"
    scorers: ClassVar = {"accuracy": starts_with}
    max_new_tokens = 8
    options_type = InContextLearningOptions

    def __init__(self, options: InContextLearningOptions | None = None) -> None:
        super().__init__(options)
        if self.options.greedy:
            self.answering = "generation"

    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give every question under every seed."""
        assert data is not None
        options: InContextLearningOptions = self.options
        fields = ("text", "label")
        questions, demonstrations = (
            {
                name: read_records(data / "icl" / f"{name}_{part}.jsonl", fields)
                for name in options.datasets
            }
            for part in (split, "train")
        )
        # Data sets turn by turn, so that the foreign memory of each is another's.
        for seed in range(options.seeds):
            for dataset in options.datasets:
                wanted = options.cached + options.shots
                have = demonstrations[dataset]
                if wanted > len(have):
                    raise ConfigError(
                        f"cached + shots must be at most the {len(have)} training sentences of "
                        f"{dataset}, got {wanted}"
                    )
                drawn = random.Random(f"{dataset} {seed}").sample(have, wanted)
                shown = [worded(dataset, **_content(record)) for record in drawn]
                memory = "".join(shown[: options.cached])
                before = "".join(shown[options.cached :])
                labels = LABELS[dataset]
                for number, record in enumerate(questions[dataset]):
                    yield Item(
                        id=f"{dataset}-{seed}-{number}",
                        group=f"{dataset}, seed {seed}",
                        memory=memory,
                        prompt=before + worded(dataset, str(record["text"])),
                        choices=tuple(f" {label}" for label in labels),
                        gold=labels.index(record["label"]),
                        answers=(str(record["label"]),),
                    )


def worded(dataset: str, text: str, label: str | None = None) -> str:
    """Give a demonstration, or a question where there is no label."""
    asked = "Type" if dataset == "subj" else "Sentiment"
    question = f"Text: {text}\n{asked}:"
    return question if label is None else f"{question} {label}\n\n"


def _content(record: Mapping[str, Any]) -> dict[str, str]:
    return {"text": str(record["text"]), "label": str(record["label"])}
