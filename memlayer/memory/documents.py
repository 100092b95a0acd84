"""Which documents a memory was given, by name; a document's number is its place in the list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from memlayer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """What is known of one document.

    Attributes:
        name: unique within a memory.
        tokens: how many of its tokens were memorized, of the row that read most of it. The oldest
            may have been dropped since.
        sha256: of all its token ids, where whoever memorized it said so.
        complete: whether it was memorized to its end, where whoever memorized it said so.
    """

    name: str
    tokens: int = 0
    sha256: str | None = None
    complete: bool = False


class Documents:
    """The documents of a memory, numbered in the order in which they came."""

    def __init__(self, records: Iterable[DocumentRecord] = ()) -> None:
        self._records = list(records)
        self._numbers = {record.name: number for number, record in enumerate(self._records)}

    @property
    def records(self) -> tuple[DocumentRecord, ...]:
        """What is known of each document."""
        return tuple(self._records)

    @property
    def names(self) -> list[str]:
        """Their names, a copy."""
        return [record.name for record in self._records]

    def find(self, name: str) -> DocumentRecord | None:
        """Give the record of a document, or None if there is none of that name."""
        number = self._numbers.get(name)
        return None if number is None else self._records[number]

    def number(self, name: str) -> int:
        """Give a document's number; a new name is added.

        Raises:
            ConfigError: if the name is not text, or empty.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a document's name must be text that is not empty, got {name!r}")
        if name not in self._numbers:
            self._numbers[name] = len(self._records)
            self._records.append(DocumentRecord(name=name))
        return self._numbers[name]

    def update(self, name: str, **changes: Any) -> None:
        """Set fields of a document's record; a new name is added."""
        number = self.number(name)
        self._records[number] = replace(self._records[number], **changes)

    def read_to(self, number: int, tokens: int) -> None:
        """Note that a document was memorized up to its token ``tokens``."""
        record = self._records[number]
        if tokens > record.tokens:
            self._records[number] = replace(record, tokens=tokens)
