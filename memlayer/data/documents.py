"""What a corpus is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test", "all"]


@dataclass(frozen=True)
class Document:
    """A text that is read from its start to its end.

    Attributes:
        id: unique among the documents of one call of `load_documents`; decides the split.
        text: never empty.
        split: the split that its data set puts it in; None where `memlayer.data.splits` decides.
    """

    id: str
    text: str
    split: Split | None = None
