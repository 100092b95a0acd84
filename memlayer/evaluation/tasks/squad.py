"""Extractive question answering with demonstrations before the question and in memory.

Source:
    SQuAD (arXiv:1606.05250); LongMem (arXiv:2306.07174), 3 demonstrations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlayer.errors import ConfigError
from memlayer.evaluation.tasks.task import Item, Split, Task, at_least, read_records


@dataclass(frozen=True, kw_only=True)
class SquadOptions:
    """How many demonstrations where.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    shots: int = 3
    """Demonstrations before the question. What the window has no room for goes to memory."""

    cached: int = 100
    """Demonstrations in memory."""

    seed: int = 0
    """Of their drawing."""

    def __post_init__(self) -> None:
        at_least("shots", self.shots, 0)
        at_least("cached", self.cached, 0)
        at_least("seed", self.seed, 0)


class Squad(Task):
    """Questions of ``qa/squad_xquad_en_{split}.jsonl``, demonstrations from ``_train``."""

    name = "squad"
    summary = "Extractive question answering: exact match and F1 of what is generated."
    answering = "generation"
    max_new_tokens = 24
    options_type = SquadOptions

    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give the questions; each article is a group."""
        assert data is not None
        options: SquadOptions = self.options
        fields = ("id", "title", "context", "question", "answers")
        questions, demonstrations = (
            read_records(data / "qa" / f"squad_xquad_en_{part}.jsonl", fields)
            for part in (split, "train")
        )
        wanted = options.shots + options.cached
        if wanted > len(demonstrations):
            raise ConfigError(
                f"cached + shots must be at most the {len(demonstrations)} training questions, got "
                f"{wanted}"
            )
        drawn = random.Random(options.seed).sample(demonstrations, wanted)
        shown = [
            f"{worded(record)} {record['answers'][0]['text']}\n\n"  # the first of equals
            for record in drawn
        ]
        memory = "".join(shown[: options.cached])
        before = "".join(shown[options.cached :])
        for record in questions:
            yield Item(
                id=str(record["id"]),
                group=str(record["title"]),
                memory=memory,
                prompt=before + worded(record),
                answers=tuple(str(answer["text"]) for answer in record["answers"]),
            )


def worded(record: Mapping[str, Any]) -> str:
    """Give a question with its paragraph."""
    return f"{record['context']}\nQuestion: {record['question']}\nAnswer:"
