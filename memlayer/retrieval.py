"""The contract of a retrieval backend: inner-product search over independent lanes.

One lane is one row of a batch times one key/value head. A backend knows nothing of rows, heads,
tokens or values: it maps query vectors to the insertion numbers of stored vectors.

    write: chunk keys (lanes, n, dim) -> add;  the ring is full -> remove_oldest
    read:  queries (lanes, q, dim) -> search -> SearchResult(scores, ids), both (lanes, q, k)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from memlayer.errors import ShapeError


@dataclass(frozen=True)
class SearchResult:
    """What a search found, best first.

    Attributes:
        scores: ``(lanes, q, k)``, float32. Inner products, falling along ``k``; ``-inf`` where a
            lane holds fewer than ``k`` vectors.
        ids: ``(lanes, q, k)``, int64. Insertion numbers in the lane; ``-1`` where ``scores`` is
            ``-inf``. An id never changes while its vector is stored.
    """

    scores: Tensor
    ids: Tensor

    def recall(self, exact: SearchResult) -> float:
        """Give the part of what an exact search found that this one found too.

        Among equal scores either search may have chosen other ids, which then count as missed.

        Args:
            exact: the result of an exact search for the same queries and the same ``k``.

        Returns:
            From 0 to 1; 1 where there was nothing to find.

        Raises:
            ShapeError: if the two results differ in shape.
        """
        if self.ids.shape != exact.ids.shape:
            raise ShapeError(
                "recall compares results of the same queries and k, got ids of shapes "
                f"{tuple(self.ids.shape)} and {tuple(exact.ids.shape)}"
            )
        wanted = exact.ids.contiguous()
        found = self.ids.to(wanted.device).sort(-1).values
        nearest = torch.searchsorted(found, wanted).clamp(max=found.shape[-1] - 1)
        valid = wanted >= 0
        hits = (found.gather(-1, nearest) == wanted) & valid
        total = int(valid.sum())
        return int(hits.sum()) / total if total else 1.0


class RetrievalBackend(ABC):
    """Inner-product search over ``lanes`` independent sets of vectors.

    Each lane numbers its vectors 0, 1, 2, ... in the order in which they were added, and goes on
    counting when old ones are removed; `clear` starts that lane again at 0.

    Threads: any number of them may call `search`, `counts` and `save` at the same time, and each
    gets what it would have got alone; an approximate backend may learn from what it is asked, so
    that its results differ within its recall. What writes (`add`, `remove_oldest`, `clear`,
    `load`) must have the backend to itself, which is the caller's business.

    Equal scores: a search may give any of the vectors that share the last score it has room for,
    but never one of them in place of a better one.

    Magnitudes: where a product, or a partial sum of one, lies beyond float32's range, it is not
    defined which of these vectors are found. Even then a score is never NaN or ``+inf``, and
    ``-inf`` only beside the id -1. An approximate backend may in addition need keys that are not
    tiny: below about 1e-3, some engines cannot tell their distances apart.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: the backend's own; an unknown one raises `ConfigError`.
    """

    worth_measuring: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Sets of options that `memlayer bench` compares, where it is told no others."""

    def __init__(self, *, lanes: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.lanes = lanes
        self.dim = dim
        self.device = torch.device(device)

    @abstractmethod
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        """Append copies of vectors.

        Args:
            keys: ``(len(lanes), n, dim)``, any float dtype. Appended in order along ``n``.
            lanes: the lanes that receive them, each at most once; None for all.

        Raises:
            ShapeError: if the shape or device is wrong or a key is NaN or infinite; nothing is
                stored then.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Find the ``k`` largest inner products of each query in its own lane.

        A query with a NaN or infinite element finds nothing. Products are taken in float32 or
        better, under autocast too; no gradient flows through them.

        Args:
            queries: ``(lanes, q, dim)``, any float dtype.
            k: vectors to find per query, at least 1.

        Returns:
            Scores and ids ``(lanes, q, k)``, always of that shape, on the queries' device.

        Raises:
            ShapeError: if the shape, dtype or device is wrong.
            ConfigError: if ``k`` is not a whole number of at least 1.
        """

    @abstractmethod
    def remove_oldest(self, n: int, lanes: Sequence[int] | None = None) -> None:
        """Drop the ``n`` oldest vectors of each given lane, in O(n) amortised.

        Raises:
            ShapeError: if a lane holds fewer than ``n``; nothing is dropped then.
        """

    @abstractmethod
    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, whose numbering starts again at 0."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Give the number of vectors that each lane holds: ``(lanes,)``, int64, on the CPU."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write everything needed to give the same answers later into an existing directory."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Replace the contents by what `save` wrote.

        Raises:
            MemoryFormatError: if the files are missing, damaged or of other lanes or dim; the
                contents are then what they were.
        """

    @property
    def exact(self) -> bool:
        """Whether no search ever misses one of the ``k`` best; not promised unless overridden."""
        return False

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say why this backend cannot run here (a missing library or device), or None if it can."""
        return None
