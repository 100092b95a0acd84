"""Key-value retrieval: the value of one key among many random pairs.

Source:
    Lost in the Middle (arXiv:2307.03172).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.tasks.scores import starts_with
from memlayer.evaluation.tasks.task import Item, Split, Task, at_least, read_records


@dataclass(frozen=True, kw_only=True)
class KeyValuesOptions:
    """How many pairs.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    pairs: int = 75
    """Pairs of an item: 75 or 140."""

    def __post_init__(self) -> None:
        at_least("pairs", self.pairs, 1)
        if self.pairs not in (75, 140):
            raise ConfigError(f"pairs must be 75 or 140, got {self.pairs}")


class KeyValues(Task):
    """Items of ``retrieval/kv_{pairs}_keys.jsonl``; the test split is all there is."""

    name = "kv"
    summary = "Key-value retrieval: the value of one key among random pairs in memory."
    answering = "generation"
    scorers: ClassVar = {"accuracy": starts_with}
    max_new_tokens = 48
    options_type = KeyValuesOptions

    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give the items, each a group of its own: no two share a pair."""
        assert data is not None
        if split != "test":
            raise DataError(f"task kv has a test split only, got {split!r}")
        path = data / "retrieval" / f"kv_{self.options.pairs}_keys.jsonl"
        for record in read_records(path, ("id", "key", "value", "records")):
            yield Item(
                id=str(record["id"]),
                group=str(record["id"]),
                memory="".join(f'"{key}": "{value}"\n' for key, value in record["records"]),
                prompt=f'"{record["key"]}":',
                answers=(str(record["value"]),),
            )
