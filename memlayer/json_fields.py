"""Reading fields of untrusted JSON: each is of the promised type and range, or an error of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlayer.errors import MemlayerError

LARGEST = 2**53
"""Whole numbers beyond this are no count of anything."""


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are taken one by one.

    Attributes:
        values: the object.
        path: the file that it stands in, for messages.
        error: what is raised of a field that is wrong.
        place: where in the file, for messages: ``"shards[2]."``.
    """

    values: dict[str, Any]
    path: Path
    error: type[MemlayerError]
    place: str = ""

    def damaged(self, name: str, expected: str) -> MemlayerError:
        """Give the error for a field that is not what it has to be."""
        got = repr(self.values[name]) if name in self.values else "nothing"
        got = got if len(got) <= 60 else f"{got[:57]}..."
        return self.error(
            f"{self.path} is damaged: {self.place}{name} must be {expected}, got {got}"
        )

    def text(self, name: str) -> str:
        """Take a string."""
        value: Any = self.values.get(name)
        if not isinstance(value, str):
            raise self.damaged(name, "text")
        return value

    def optional_text(self, name: str) -> str | None:
        """Take a string or null."""
        return None if self.values.get(name, 0) is None else self.text(name)

    def truth(self, name: str) -> bool:
        """Take true or false."""
        value: Any = self.values.get(name)
        if not isinstance(value, bool):
            raise self.damaged(name, "true or false")
        return value

    def whole(self, name: str, *, least: int = 0) -> int:
        """Take a whole number of at least ``least``."""
        value: Any = self.values.get(name)
        if not _is_whole(value, least):
            raise self.damaged(name, f"a whole number of at least {least}")
        return int(value)

    def number(self, name: str, *, most: float = math.inf) -> float:
        """Take a finite number from 0 to ``most``."""
        value: Any = self.values.get(name)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not 0 <= value <= min(most, LARGEST):
            upper = "" if most == math.inf else f" and at most {most}"
            raise self.damaged(name, f"a number of at least 0{upper}")
        return float(value)

    def wholes(self, name: str, *, length: int | None = None) -> tuple[int, ...]:
        """Take a list of whole numbers, of a given length if one is given."""
        value: Any = self.values.get(name)
        fits = isinstance(value, list) and length in (None, len(value))
        if not fits or not all(_is_whole(number, 0) for number in value):
            count = "" if length is None else f"{length} "
            raise self.damaged(name, f"a list of {count}whole numbers")
        return tuple(value)

    def object(self, name: str) -> Fields:
        """Take an object."""
        value: Any = self.values.get(name)
        if not isinstance(value, dict):
            raise self.damaged(name, "an object")
        return Fields(value, self.path, self.error, f"{self.place}{name}.")

    def optional_object(self, name: str) -> Fields | None:
        """Take an object or null."""
        return None if self.values.get(name, 0) is None else self.object(name)

    def objects(self, name: str) -> list[Fields]:
        """Take a list of objects."""
        value: Any = self.values.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.damaged(name, "a list of objects")
        return [
            Fields(item, self.path, self.error, f"{self.place}{name}[{number}].")
            for number, item in enumerate(value)
        ]

    def expect_only(self, names: Sequence[str]) -> None:
        """Refuse fields that this version does not know."""
        unknown = sorted(set(self.values) - set(names))
        if unknown:
            raise self.error(
                f"{self.path} is damaged: unknown field {self.place}{unknown[0][:40]!r}"
            )


def read_json_object(path: Path, *, largest: int, error: type[MemlayerError]) -> Fields:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        largest: bytes beyond which it is not read.
        error: what to raise if it is no ordinary file, too large, or not one JSON object.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        # Before it is opened: a pipe would wait for its other end.
        if path.exists() and not path.is_file():
            raise error(f"{path} is damaged: it is no ordinary file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise error(f"{path} is damaged: it has more than {largest:,} bytes")
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise
    except error:
        raise
    # A RecursionError comes from lists within lists within lists.
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} is damaged: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds no JSON object")
    return Fields(value, path, error)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST
