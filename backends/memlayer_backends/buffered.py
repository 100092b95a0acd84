"""What all built-in backends share: the checks, the stored vectors, the options and the file.

A backend that keeps its vectors in a `KeyBuffer` only has to search them: it subclasses
`BufferedBackend` and writes `search_keys`; what it builds beside them is built in `rebuild`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from memlayer.errors import BackendUnavailableError, ShapeError
from memlayer.retrieval import RetrievalBackend, SearchResult
from memlayer_backends._checks import (
    check_finite,
    check_removal,
    check_vectors,
    check_whole_number,
    read_options,
    select_lanes,
)
from memlayer_backends._precision import full_precision
from memlayer_backends._saved_keys import SavedKeys, read_keys, write_keys
from memlayer_backends.key_buffer import KeyBuffer

LARGEST = torch.finfo(torch.float32).max
"""The score of a product that is larger, or that float32 cannot sum."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a backend that has none."""


class BufferedBackend(RetrievalBackend):
    """A retrieval backend over a `KeyBuffer`.

    Attributes:
        options: an instance of `options_type`.
        buffer: the stored vectors.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: fields of `options_type`.

    Raises:
        ConfigError: if an option is unknown or has a wrong value.
        BackendUnavailableError: if a library or device is missing.
    """

    name: ClassVar[str]
    """The name that the backend is registered under."""

    options_type: ClassVar[type[Any]] = NoOptions
    """A dataclass of what the backend can be told; JSON types only."""

    keeps_keys_on_cpu: ClassVar[bool] = False
    """Whether vectors are stored and searched on the CPU, wherever the queries are."""

    options: Any

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        self.options = read_options(self.options_type, self.name, options)
        check_whole_number("lanes", lanes, minimum=1)
        check_whole_number("dim", dim, minimum=1)
        reason = self.unavailable_reason()
        if reason is not None:
            raise BackendUnavailableError(reason)
        super().__init__(lanes=lanes, dim=dim, device=device)
        kept_on = torch.device("cpu") if self.keeps_keys_on_cpu else self.device
        self.buffer = KeyBuffer(lanes=lanes, dim=dim, device=kept_on, dtype=self.storage)

    @property
    def storage(self) -> torch.dtype:
        """What vectors are kept in: float32, unless an option says otherwise."""
        return torch.float32

    @abstractmethod
    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the ``k`` best vectors of lanes of which one at least is not empty.

        Args:
            queries: ``(lanes, q, dim)``, float32, finite, contiguous, where the keys are; q > 0.
            k: at least 1, at most the vectors of the fullest lane.

        Returns:
            Scores (``-inf`` where there is nothing) and ids (anything there), ``(lanes, q, k)``.
        """

    @torch.no_grad()
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        """Append vectors, as the contract says."""
        chosen = select_lanes(lanes, self.lanes)
        check_vectors("keys", keys, lanes=len(chosen), dim=self.dim, device=self.device)
        # Checked as stored: float64 has finite values that float32 does not.
        keys = keys.to(self.buffer.keys.device, self.storage)
        check_finite(keys, chosen)
        self.buffer.append(keys, chosen)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Find the ``k`` largest inner products, as the contract says."""
        check_vectors("queries", queries, lanes=self.lanes, dim=self.dim, device=self.device)
        check_whole_number("k", k, minimum=1)
        found = min(k, int(self.buffer.counts.max()))
        if not found or not queries.shape[1]:
            scores = queries.new_empty(self.lanes, queries.shape[1], 0, dtype=torch.float32)
            return _padded(scores, scores.long(), k)
        kept = self.buffer.keys.device
        vectors = queries.to(kept, torch.float32).contiguous()
        # Asking a GPU would make it wait; the CPU knows at once that there is nothing to mask.
        finite = None
        if kept.type != "cpu" or not math.isfinite(vectors.abs().max()):
            finite = torch.isfinite(vectors).all(-1, keepdim=True)
            # So one that is not finite finds nothing in every backend alike.
            vectors = vectors.masked_fill(~finite, 0.0)
        with full_precision(kept):
            scores, ids = self.search_keys(vectors, found)
        # Products beyond float32: a search that sorts NaN and infinity at all puts them first.
        scores = scores.nan_to_num(LARGEST, LARGEST, -torch.inf)
        if finite is not None:
            scores = scores.masked_fill(~finite, -torch.inf)
        ids = ids.masked_fill(scores == -torch.inf, -1)
        return _padded(scores.to(queries.device), ids.to(queries.device), k)

    def remove_oldest(self, n: int, lanes: Sequence[int] | None = None) -> None:
        """Drop the oldest vectors, as the contract says."""
        chosen = select_lanes(lanes, self.lanes)
        check_removal(n, self.buffer.counts, chosen)
        self.buffer.drop_oldest(n, chosen)

    def clear(self, lanes: Sequence[int] | None = None) -> None:
        """Drop all vectors of the given lanes, as the contract says."""
        self.buffer.clear(select_lanes(lanes, self.lanes))

    def counts(self) -> Tensor:
        """Give the number of vectors of each lane, as the contract says."""
        return self.buffer.counts.clone()

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Write ``index.safetensors`` into an existing directory, whole or not at all."""
        buffer = self.buffer
        saved = SavedKeys(
            keys=buffer.live(torch.arange(self.lanes)).cpu(),
            counts=buffer.counts.clone(),
            first_ids=buffer.first_ids.clone(),
        )
        write_keys(directory, saved, backend=self.name, options=asdict(self.options))

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Replace the contents by what any built-in backend saved; the options stay this one's."""
        saved = read_keys(directory, lanes=self.lanes, dim=self.dim)
        self.buffer.replace(saved.keys, saved.counts, saved.first_ids)
        self.rebuild()

    def take_over(self, buffer: KeyBuffer) -> None:
        """Replace the contents by another backend's vectors, under their ids.

        They are not copied, unless they are stored in another dtype.

        Args:
            buffer: of as many lanes and the same dim; whoever held it must not use it any more.

        Raises:
            ShapeError: if it is of another size, or lies where this backend cannot search.
        """
        held, offered = self.buffer.keys, buffer.keys
        for what, wanted, got in (
            ("lanes", held.shape[0], offered.shape[0]),
            ("dim", held.shape[2], offered.shape[2]),
            ("device", held.device, offered.device),
        ):
            if wanted != got:
                raise ShapeError(
                    f"backend {self.name!r} can take over vectors of {what} {wanted} only, got "
                    f"{got}; save and load them instead"
                )
        buffer.keys = buffer.keys.to(self.storage)
        self.buffer = buffer
        self.rebuild()

    def rebuild(self) -> None:
        """Build anew whatever is searched beside the buffer, whose contents were replaced."""


def _padded(scores: Tensor, ids: Tensor, k: int) -> SearchResult:
    """Fill results of fewer than ``k`` vectors up with what stands for nothing."""
    if scores.shape[2] < k:
        missing = (0, k - scores.shape[2])
        scores = pad(scores, missing, value=-torch.inf)
        ids = pad(ids, missing, value=-1)
    return SearchResult(scores=scores, ids=ids)
