"""Suffix identification: which of six passages begins the next chapter.

Source:
    ChapterBreak (arXiv:2204.10878), the idea; LongMem (arXiv:2306.07174), table 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlayer.evaluation.tasks.task import Item, Split, Task, at_least, read_records, read_texts


@dataclass(frozen=True, kw_only=True)
class ChapterBreakOptions:
    """How much of the book stands before the choice.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    prefix_characters: int = 36_000
    """Characters before the chapter's beginning, some four a token."""

    local_characters: int = 4000
    """Those of them that stand in the prompt; the rest is in memory."""

    def __post_init__(self) -> None:
        at_least("local_characters", self.local_characters, 1)
        at_least("prefix_characters", self.prefix_characters, self.local_characters)


class ChapterBreak(Task):
    """Items of ``chapterbreak/chapterbreak_{split}.jsonl``, text of ``books/``."""

    name = "chapterbreak"
    summary = "Suffix identification: the next chapter's beginning among six passages."
    answering = "choice"
    chance = 1 / 6
    options_type = ChapterBreakOptions

    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give the chapters of each book."""
        assert data is not None
        options: ChapterBreakOptions = self.options
        records = read_records(
            data / "chapterbreak" / f"chapterbreak_{split}.jsonl",
            ("id", "book_id", "prefix_start", "prefix_end", "candidates", "label"),
        )
        texts = read_texts(
            data / "books" / f"books_{split}.jsonl", {record["book_id"] for record in records}
        )
        for record in sorted(records, key=lambda one: (one["book_id"], one["prefix_end"])):
            prefix = texts[record["book_id"]][record["prefix_start"] : record["prefix_end"]]
            prefix = prefix[-options.prefix_characters :].rstrip()
            yield Item(
                id=str(record["id"]),
                group=str(record["book_id"]),
                memory=prefix[: -options.local_characters],
                prompt=prefix[-options.local_characters :],
                choices=tuple("\n\n" + one["text"] for one in record["candidates"]),
                gold=record["label"],
            )
