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

    def add(self, document: Document) -> str | None:
        """Take a document and give its text's hash; None if that text was there under its id."""
        found = hashlib.sha256(document.text.encode()).hexdigest()[:32]
        hashes = self._hashes.setdefault(document.id, set())
        if found in hashes:
            self._repeated += 1
            return None
        hashes.add(found)
        return found

    def final_id(self, document_id: str, text_hash: str) -> str:
        """Give an id, once all documents are taken: the text's hash is behind it if need be."""
        alone = len(self._hashes[document_id]) == 1
        return document_id if alone else f"{document_id}#{text_hash[:8]}"

    def report(self) -> None:
        """Log how many documents were there already."""
        if self._repeated:
            logger.warning("left out %d documents that the sources give twice", self._repeated)
