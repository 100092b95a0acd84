"""What a corpus is made of."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

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


class DistinctTexts:
    """Keeps each text under an id once, and tells different texts under one id apart.

    It holds a hash a document, not the text.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, set[str]] = {}
        self._repeated = 0

    def add(self, document: Document) -> bool:
        """Take a document; False if its very text was there under its id."""
        hashes, found = self._hashes.setdefault(document.id, set()), text_hash(document.text)
        if found in hashes:
            self._repeated += 1
            return False
        hashes.add(found)
        return True

    def final_id(self, document_id: str, found: str) -> str:
        """Give an id, once all documents are taken: the text's hash is behind it if need be."""
        alone = len(self._hashes[document_id]) == 1
        return document_id if alone else f"{document_id}#{found[:8]}"

    def report(self) -> None:
        """Log how many documents were there already."""
        if self._repeated:
            logger.warning("left out %d documents that the sources give twice", self._repeated)


def text_hash(text: str) -> str:
    """Give 32 hexadecimal digits that no other text has."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
