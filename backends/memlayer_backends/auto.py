"""The backend that is chosen for you, and says why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayer.errors import ConfigError
from memlayer.retrieval import RetrievalBackend, SearchResult
from memlayer_backends._checks import check_whole_number, read_options
from memlayer_backends.hnswlib_graph import HnswlibBackend
from memlayer_backends.torch_exact import TorchBackend

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

LARGE_LANE = 131_072
"""Vectors per lane from which on a graph is worth building on a CPU.

Measured on two cores, dim 64, k 16, a lane of 65,536: a vector takes 0.5 ms to add, and a query
0.3 ms instead of 0.8 ms of exact search, so that below about this size a graph that is written
as often as it is read costs more than it saves.
"""


@dataclass(frozen=True, kw_only=True)
class AutoOptions:
    """Options of the ``auto`` backend."""

    expected_size: int | None = None
    """Vectors per lane that it will hold, which is memory_size / chunk_size. None: not known."""

    approximate: bool = False
    """Whether a search that misses a few of the best vectors will do where it is faster."""

    def __post_init__(self) -> None:
        if self.expected_size is not None:
            check_whole_number("expected_size", self.expected_size, minimum=1)
        if not isinstance(self.approximate, bool):
            raise ConfigError(f"approximate must be True or False, got {self.approximate!r}")


class AutoBackend(RetrievalBackend):
    """The built-in backend that suits device, size and request; everything is handed on to it.

    Attributes:
        choice: the name of that backend.
        reason: why, in one sentence, which is also logged, once.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: fields of `AutoOptions`.
    """

    name = "auto"

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        self.options = read_options(AutoOptions, self.name, options)
        super().__init__(lanes=lanes, dim=dim, device=device)
        backend, self.reason = _choose(self.device, self.options)
        self.choice = backend.name
        self._chosen = backend(lanes=lanes, dim=dim, device=device)
        _log_once(self.choice, self.reason)

    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        """Append vectors, as the contract says."""
        self._chosen.add(keys, lanes)

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Find the ``k`` largest inner products, as the contract says."""
        return self._chosen.search(queries, k)

    def remove_oldest(self, n: int, lanes: Sequence[int] | None = None) -> None:
        """Drop the oldest vectors, as the contract says."""
        self._chosen.remove_oldest(n, lanes)

    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, as the contract says."""
        self._chosen.clear(lanes)

    def counts(self) -> Tensor:
        """Give the number of vectors of each lane, as the contract says."""
        return self._chosen.counts()

    def save(self, directory: Path) -> None:
        """Write what the chosen backend writes, which every built-in backend reads."""
        self._chosen.save(directory)

    def load(self, directory: Path) -> None:
        """Replace the contents by what any built-in backend saved."""
        self._chosen.load(directory)


def _choose(
    device: torch.device, options: AutoOptions
) -> tuple[type[TorchBackend | HnswlibBackend], str]:
    if device.type != "cpu":
        return TorchBackend, f"exact, and one batched product searches all lanes on {device}"
    if not options.approximate:
        return TorchBackend, "exact, and approximate search was not asked for"
    size = options.expected_size
    if size is None:
        return TorchBackend, "exact, since expected_size was not given"
    if size < LARGE_LANE:
        return TorchBackend, f"exact, and quick enough for {size} vectors a lane"
    missing = HnswlibBackend.unavailable_reason()
    if missing is not None:
        return TorchBackend, f"exact, since {missing}"
    return HnswlibBackend, f"approximate, as asked for, with {size} vectors a lane on a CPU"


@cache
def _log_once(choice: str, reason: str) -> None:
    logger.info("retrieval backend %s: %s", choice, reason)
