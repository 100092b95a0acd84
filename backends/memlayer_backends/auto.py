"""The backend that is chosen for you, changes as the memory grows, and says why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from memlayer.errors import ConfigError
from memlayer.retrieval import RetrievalBackend, SearchResult
from memlayer_backends._auto_plan import Step, find_kind, make_plan
from memlayer_backends._checks import check_whole_number, read_options
from memlayer_backends.torch_exact import TorchBackend

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from memlayer_backends.buffered import BufferedBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """Options of the ``auto`` backend."""

    expected_size: int | None = None
    """Vectors per lane, memory_size / chunk_size, to choose for once and for all. None: the choice
    follows what is stored."""

    approximate: bool = False
    """Whether a search that misses a few of the best vectors will do where it is quicker."""

    minimum_recall: float = 0.95
    """The part of the best vectors that an approximate search must have found when measured."""

    queries: int | None = None
    """Queries of one search in each lane: 1 when decoding, a segment's tokens when reading text.
    None: the fewest and the most that were measured, equally weighed."""

    writes_per_query: float = 0.25
    """Vectors that are added to a lane for each query: 1 / chunk_size where every token asks and
    is remembered, 0 where a filled memory is only read."""

    def __post_init__(self) -> None:
        for name in ("expected_size", "queries"):
            if getattr(self, name) is not None:
                check_whole_number(name, getattr(self, name), minimum=1)
        if not isinstance(self.approximate, bool):
            raise ConfigError(f"approximate must be True or False, got {self.approximate!r}")
        if not _is_number(self.minimum_recall) or not 0 <= self.minimum_recall <= 1:
            raise ConfigError(
                f"minimum_recall must be a number from 0 to 1, got {self.minimum_recall!r}"
            )
        if not _is_number(self.writes_per_query) or not 0 <= self.writes_per_query < float("inf"):
            raise ConfigError(
                f"writes_per_query must be a number of at least 0, got {self.writes_per_query!r}"
            )


class AutoBackend(RetrievalBackend):
    """The built-in backend that a table of measurements says suits device, size and use.

    When the fullest lane has as many vectors as another backend is better for, that one takes the
    vectors over, without copying them; a backend with a structure of its own builds it then. On the
    way down it is given up at half that number, so that a memory near it does not go to and fro.

    Attributes:
        options: what was asked for.
        steps: the backends, and from how many vectors a lane on each is used.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: fields of `AutoOptions`.
    """

    name = "auto"
    worth_measuring: ClassVar = ()  # what it chooses is measured itself

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        self.options = read_options(AutoOptions, self.name, options)
        super().__init__(lanes=lanes, dim=dim, device=device)
        self.steps = make_plan(self.options, self.device)
        self._at = 0
        self._engine = self._make(self._step)
        _log_once(self.choice, self.reason)

    @property
    def choice(self) -> str:
        """The backend in use, with its options: ``torch``, ``faiss:index=ivf``."""
        return str(self._step.setup)

    @property
    def reason(self) -> str:
        """Why, in one clause, which is also logged, once."""
        return self._step.reason

    @property
    def exact(self) -> bool:
        """As the backend in use."""
        return self._engine.exact

    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        """Append vectors, as the contract says."""
        self._engine.add(keys, lanes)
        self._settle()

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Find the ``k`` largest inner products, as the contract says."""
        return self._engine.search(queries, k)

    def remove_oldest(self, n: int, lanes: Sequence[int] | None = None) -> None:
        """Drop the oldest vectors, as the contract says."""
        self._engine.remove_oldest(n, lanes)
        self._settle()

    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, as the contract says."""
        self._engine.clear(lanes)
        self._settle()

    def counts(self) -> Tensor:
        """Give the number of vectors of each lane, as the contract says."""
        return self._engine.counts()

    def save(self, directory: Path) -> None:
        """Write what the backend in use writes, which every built-in backend reads."""
        self._engine.save(directory)

    def load(self, directory: Path) -> None:
        """Replace the contents by what any built-in backend saved."""
        # Read by a backend that builds nothing, so that the right one builds once.
        loaded = TorchBackend(lanes=self.lanes, dim=self.dim, device=self.device)
        loaded.load(directory)
        self._change(self._suited(0, int(loaded.counts().max())), loaded)

    @property
    def _step(self) -> Step:
        return self.steps[self._at]

    def _make(self, step: Step) -> BufferedBackend:
        kind = find_kind(step.setup)
        return kind(lanes=self.lanes, dim=self.dim, device=self.device, **step.setup.options)

    def _settle(self) -> None:
        at = self._suited(self._at, int(self._engine.buffer.counts.max()))
        if at != self._at:
            self._change(at, self._engine)

    def _suited(self, at: int, size: int) -> int:
        while at + 1 < len(self.steps) and size >= self.steps[at + 1].from_size:
            at += 1
        while 2 * size < self.steps[at].from_size:
            at -= 1
        return at

    def _change(self, at: int, holder: BufferedBackend) -> None:
        step = self.steps[at]
        # Before the work: to build a large graph takes a while.
        _log_once(str(step.setup), step.reason)
        engine = self._make(step)
        engine.take_over(holder.buffer)
        self._engine, self._at = engine, at


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache
def _log_once(choice: str, reason: str) -> None:
    logger.info("retrieval backend %s: %s", choice, reason)
