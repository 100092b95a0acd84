"""What an evaluation task is.

    files ─► Task.items ─► Item(memory, prompt, choices or answers) ─► run.py scores each of them

A task only reads its files and words its items; how memory is filled, how a condition answers and
how scores are compared is the same for all. A plug-in subclasses `Task` and names the class in its
``register_tasks`` hook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.tasks.scores import exact_match, f1

Split: TypeAlias = Literal["train", "validation", "test"]
Answering: TypeAlias = Literal["choice", "target", "generation"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question.

    Attributes:
        id: unique within the task.
        group: what it belongs to (a data set and seed, a book): scores are also given by group, and
            the foreign memory of an item is that of another group.
        memory: text that goes to memory, or stands before the prompt where context is dense.
        prompt: text in the local window. It ends without a blank.
        choices: how the text may go on, each beginning with its blank. With ``"target"``: one.
        gold: the right choice.
        answers: with ``"generation"``, texts of which any is right.
    """

    id: str
    group: str
    memory: str
    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The options of a task that has none."""


class Task(ABC):
    """An evaluation task.

    Args:
        options: an instance of ``options_type``; its defaults if None.
    """

    name: ClassVar[str]
    """The name that it is registered under."""

    summary: ClassVar[str]
    """One line for ``--help``."""

    answering: Answering
    """``"choice"``: the likeliest of several; ``"target"``: how likely the one right continuation
    is, and whether it is what greedy decoding gives; ``"generation"``: greedy text, compared. An
    instance may set its own, where the options decide."""

    chance: ClassVar[float | None] = None
    """The score of guessing, where that is the same for all items."""

    max_new_tokens: ClassVar[int] = 32
    """Of a generated answer, which ends with its line."""

    scorers: ClassVar[Mapping[str, Callable[[str, Sequence[str]], float]]] = {
        "exact_match": exact_match,
        "f1": f1,
    }
    """Of a generated answer, by the metric's name; each takes it and the right ones."""

    needs_data: ClassVar[bool] = True
    """Whether `items` reads files; otherwise ``data`` may be None."""

    options_type: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass of what the task can be told, each field with a docstring under it."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.options_type() if options is None else options

    @abstractmethod
    def items(self, data: Path | None, split: Split, tokenizer: Any) -> Iterator[Item]:
        """Give the items, those that share or continue a memory after each other.

        Args:
            data: the folder of data sets, as docs/evaluation.md lays it out.
            split: which part of them.
            tokenizer: the model's, for tasks that measure length in tokens.

        Raises:
            DataError: if a file is missing or not of its form.
        """


def read_records(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read a JSON lines file, or the compressed one beside it where only that exists.

    Raises:
        DataError: if it is missing or damaged, or a record lacks a field.
    """
    from memlayer.data import records as json_lines  # imports torch, which --help does without

    found = json_lines.plain_or_compressed(path)
    try:
        records = list(json_lines.read_records(found))
    except FileNotFoundError as error:
        raise DataError(
            f"there is no {path} (nor {path.name}.gz); docs/evaluation.md says what a task reads"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {found}: {error.strerror or error}") from error
    for place, record in records:
        missing = [name for name in fields if name not in record]
        if missing:
            raise DataError(f"{place} lacks {', '.join(missing)}")
    return [record for _, record in records]


def read_texts(path: Path, ids: set[str]) -> dict[str, str]:
    """Give the texts of these documents of a JSON Lines file, by id.

    Raises:
        DataError: as for `read_records`, and if one of them is not there.
    """
    texts = {
        str(record["id"]): str(record["text"])
        for record in read_records(path, ("id", "text"))
        if record["id"] in ids
    }
    missing = sorted(ids - set(texts))
    if missing:
        raise DataError(f"{path} has no document {missing[0]!r}, which a task asks about")
    return texts


def at_least(name: str, value: object, minimum: int) -> None:
    """Refuse anything but a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be a whole number, at least {minimum}, got {value!r}")
