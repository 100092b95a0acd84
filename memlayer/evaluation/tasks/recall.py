"""Proper names that a book last mentioned far back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlayer.evaluation.tasks.task import Item, Split, Task, at_least, read_records, read_texts


@dataclass(frozen=True, kw_only=True)
class FarNamesOptions:
    """How much of a book stands before the name.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    max_characters: int = 400_000
    """Names further into their book than this are left out: memory reads a book from its start."""

    local_characters: int = 2000
    """Characters before the name that stand in the prompt; the rest is in memory."""

    def __post_init__(self) -> None:
        at_least("max_characters", self.max_characters, 1)
        at_least("local_characters", self.local_characters, 1)


class FarNames(Task):
    """Items of ``recall/farname_{split}.jsonl``, text of ``books/``."""

    name = "recall"
    summary = "Far proper names: how likely a name is that was last mentioned long ago."
    answering = "target"
    options_type = FarNamesOptions

    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give the names of each book in their order, so that one memory serves all of them."""
        assert data is not None
        options: FarNamesOptions = self.options
        records = [
            record
            for record in read_records(
                data / "recall" / f"farname_{split}.jsonl",
                ("id", "book_id", "target_start", "target"),
            )
            if record["target_start"] <= options.max_characters
        ]
        texts = read_texts(
            data / "books" / f"books_{split}.jsonl", {record["book_id"] for record in records}
        )
        for record in sorted(records, key=lambda one: (one["book_id"], one["target_start"])):
            before = texts[record["book_id"]][: record["target_start"]]
            shown = before.rstrip()
            split_at = max(0, len(shown) - options.local_characters)
            yield Item(
                id=str(record["id"]),
                group=str(record["book_id"]),
                memory=shown[:split_at],
                prompt=shown[split_at:],
                choices=(before[len(shown) :] + record["target"],),
            )
