"""Train, validation and test: by whole documents, from a hash of their ids.

A document's place depends on its id and the seed alone, so that it stays in its split when others
are added. Where that leaves a split empty, as it does in small corpora, the documents that come
nearest are moved there: then, and only then, the other documents play a part.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from memlayer.errors import DataError

if TYPE_CHECKING:
    from memlayer.data.documents import Split

VALIDATION_SHARE = 0.05
TEST_SHARE = 0.05

logger = logging.getLogger(__name__)


class Splittable(Protocol):
    """A document, whatever is known of it besides."""

    @property
    def id(self) -> str:
        """Unique among the documents."""

    @property
    def split(self) -> Split | None:
        """The split that its data set puts it in, if it does."""


_Document = TypeVar("_Document", bound=Splittable)


def select_split(documents: Sequence[_Document], *, split: Split, seed: int) -> list[_Document]:
    """Give the documents of one split in their order.

    Raises:
        DataError: if there are none.
    """
    if split == "all":
        return list(documents)
    assigned = assign_splits([item.id for item in documents if item.split is None], seed)
    selected = [item for item in documents if (item.split or assigned[item.id]) == split]
    if not selected:
        raise DataError(
            f"the sources hold {len(documents)} document(s), none of them for the {split} split; "
            "give more documents, or a file of their own for each split and split 'all'"
        )
    return selected


def assign_splits(ids: Sequence[str], seed: int) -> dict[str, Split]:
    """Give every id its split; the order of the ids plays no part.

    From two documents on there is one for validation, from three on one for test. A single one is
    for training.
    """
    positions = {item: _position(item, seed) for item in ids}
    ranked = sorted(positions, key=lambda item: (positions[item], item))
    below = [sum(position < share for position in positions.values()) for share in _BOUNDS]
    n_validation = min(max(below[0], 1), max(len(ranked) - 1, 0))
    n_test = min(max(below[1] - below[0], 1), max(len(ranked) - n_validation - 1, 0))
    if (n_validation, n_test) != (below[0], below[1] - below[0]):
        logger.warning(
            "%d documents are too few to split by hash alone: %d for training, %d for validation, "
            "%d for test",
            len(ranked),
            len(ranked) - n_validation - n_test,
            n_validation,
            n_test,
        )
    return {
        item: "validation"
        if rank < n_validation
        else "test"
        if rank < n_validation + n_test
        else "train"
        for rank, item in enumerate(ranked)
    }


_BOUNDS = (VALIDATION_SHARE, VALIDATION_SHARE + TEST_SHARE)


def _position(document_id: str, seed: int) -> float:
    """Place an id evenly in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{document_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
