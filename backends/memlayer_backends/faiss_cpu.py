"""Search with faiss on the CPU: exact, or in inverted lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from memlayer.errors import ConfigError
from memlayer_backends._checks import check_whole_number, select_lanes
from memlayer_backends._faiss_flat import FaissFlatBackend
from memlayer_backends._faiss_lists import LaneLists, default_n_lists
from memlayer_backends.key_space import QueryMoments
from memlayer_backends.rescoring import best_of

EXACT_BELOW = 4096
"""Vectors in a lane from which on inverted lists are read in less time than all vectors."""

GROWTH = 4
"""Lists are trained again when a lane holds this many times the vectors that they were trained on,
so that all trainings of a growing lane together cost 4/3 of the last one."""


@dataclass(frozen=True, kw_only=True)
class FaissOptions:
    """Options of the ``faiss`` backend."""

    index: str = "flat"
    """``"flat"``: every vector is looked at. ``"ivf"``: those of a few inverted lists are, so that
    some of the best may be missed."""

    nlist: int | None = None
    """Inverted lists of a lane. None: four times the square root of its vectors."""

    nprobe: int | None = None
    """Lists that a query reads; more find more, and take longer. None: enough for a recall of 0.95
    on keys of a language model."""

    exact_below: int | None = None
    """Vectors in a lane from which on it has lists; a smaller lane is searched exactly. None:
    4,096."""

    def __post_init__(self) -> None:
        if self.index not in ("flat", "ivf"):
            raise ConfigError(f"index must be 'flat' or 'ivf', got {self.index!r}")
        for name in ("nlist", "nprobe", "exact_below"):
            value = getattr(self, name)
            if value is None:
                continue
            check_whole_number(name, value, minimum=1)
            if self.index == "flat":
                raise ConfigError(
                    f"{name} is for index='ivf', got {name}={value} with index='flat'"
                )


class FaissBackend(FaissFlatBackend):
    """Inner-product search with faiss on the CPU, wherever the queries come from.

    With ``index="ivf"``, vectors are held twice, in the lists and in the ring beside them: small
    lanes are searched exactly, and so is a query whose lists have fewer than ``k`` vectors. Lists
    take in what was written since when they are next searched. They are trained on the lane's own
    vectors and on what it was asked, and again when the lane has grown fourfold, when none of
    those vectors is left, and once 1,024 queries are known. Nothing but vectors is saved. What is
    found depends, within the recall, on what was asked before, and after `load` the lists are new.

    Uses as many threads as torch does, and no more than there are queries in a lane.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: fields of `FaissOptions`.
    """

    name = "faiss"
    options_type = FaissOptions
    keeps_keys_on_cpu = True
    worth_measuring = ({}, {"index": "ivf"})

    options: FaissOptions

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        super().__init__(lanes=lanes, dim=dim, device=device, **options)
        self._lists: list[LaneLists | None] = [None] * lanes
        self._moments = QueryMoments(lanes=lanes, dim=dim)
        self._one_at_a_time = Lock()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say what is missing and how to install it, or give None."""
        if find_spec("faiss") is None:
            return 'faiss is not installed: pip install "memlayer-lm[faiss]"'
        return None

    @property
    def exact(self) -> bool:
        """Whether every vector is looked at."""
        return self.options.index == "flat"

    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, as the contract says."""
        super().clear(lanes)
        for lane in select_lanes(lanes, self.lanes).tolist():
            self._lists[lane] = None

    def rebuild(self) -> None:
        """Forget all lists; the next search makes new ones."""
        self._lists = [None] * self.lanes

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search each lane in its lists, which follow first, or exactly where it has none."""
        if self.exact:
            with _threads(_useful_threads(queries)):
                return self._search_exactly(queries, k, range(self.lanes))
        with self._one_at_a_time:  # Whoever searches may train.
            ids = self._candidates(queries, k)
        return best_of(self.buffer, queries, ids, k)

    def _candidates(self, queries: Tensor, k: int) -> Tensor:
        self._moments.note(queries)
        with _threads(torch.get_num_threads()):
            for lane in range(self.lanes):
                self._lists[lane] = self._up_to_date(lane)
        with _threads(_useful_threads(queries)):
            exact = [lane for lane, lists in enumerate(self._lists) if lists is None]
            _, ids = self._search_exactly(queries, k, exact)
            for lane, lists in enumerate(self._lists):
                if lists is not None:
                    found = min(k, int(self.buffer.counts[lane]))
                    ids[lane, :, :found] = self._search_lists(lane, lists, queries, found)
        return ids

    def _search_lists(self, lane: int, lists: LaneLists, queries: Tensor, k: int) -> Tensor:
        ids = lists.search(queries[lane], k, n_probe=self.options.nprobe)
        # Where the lists of a query hold fewer than k vectors, the others lie in other lists.
        short = (ids[:, -1] < 0).nonzero()[:, 0]
        if len(short):
            ids[short] = self._search_exactly(queries[:, short], k, [lane])[1][lane, :, :k]
        return ids

    def _up_to_date(self, lane: int) -> LaneLists | None:
        lists = self._lists[lane]
        count, first_id = int(self.buffer.counts[lane]), int(self.buffer.first_ids[lane])
        exact_below = self.options.exact_below or EXACT_BELOW
        # Half the threshold on the way down, or a full lane near it would train at every write.
        if count < (max(1, exact_below // 2) if lists else exact_below):
            return None
        end = first_id + count
        if lists and not self._is_outdated(lists, lane):
            lists.add(self.buffer.between(lane, lists.next_id, end))
            lists.remove_before(first_id)
            return lists
        return LaneLists(
            self.buffer.between(lane, first_id, end),
            first_id,
            n_lists=min(self.options.nlist or default_n_lists(count), count),
            moments=self._moments,
            lane=lane,
        )

    def _is_outdated(self, lists: LaneLists, lane: int) -> bool:
        return (
            int(self.buffer.counts[lane]) >= GROWTH * lists.trained_on
            or int(self.buffer.first_ids[lane]) >= lists.trained_until
            or lists.fitted_to < QueryMoments.ENOUGH <= int(self._moments.counts[lane])
        )

    def _nearest(self, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # Here and not above: on macOS, faiss and torch in one process can crash.
        import faiss

        scores, positions = faiss.knn(
            queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(scores), torch.from_numpy(positions)


def _useful_threads(queries: Tensor) -> int:
    # More threads than queries have nothing to do but wait, which takes longer than it helps.
    return min(torch.get_num_threads(), queries.shape[1])


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Let faiss use ``n`` threads. OpenMP keeps this number per calling thread."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(n)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
