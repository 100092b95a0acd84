"""What all groups of the suite share: a backend, what it should hold, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from memlayer.plugins import default_plugins
from memlayer.retrieval import RetrievalBackend, SearchResult
from memlayer.testing.backends.plain_model import PlainModel
from memlayer.testing.backends.vectors import random_vectors


class BackendCase:
    """The settings of a suite, and the steps that its tests are made of."""

    backend: ClassVar[str]
    """The registered name."""

    backend_options: ClassVar[Mapping[str, Any]] = {}
    """Options to construct it with."""

    device: ClassVar[str] = "cpu"
    """The device of keys, queries and results."""

    minimum_recall: ClassVar[float] = 1.0
    """The part of the true top k that a search must find. 1.0: the backend is exact."""

    score_tolerance: ClassVar[float] = 1e-5
    """How far a score may be from the float64 product: this times one plus its magnitude."""

    keeps_float32: ClassVar[bool] = True
    """Whether vectors are kept as exactly as they come. False where `backend_options` ask for less
    memory instead; `score_tolerance` then has to allow for the rounding."""

    random_sequences: ClassVar[int] = 40
    """Sequences of 50 random steps that are tried, the same ones in every run."""

    shortest_failure: ClassVar[bool] = True
    """Whether a failing sequence is cut down to the shortest that fails, which may take minutes."""

    def make_backend(self, lanes: int, dim: int, **options: Any) -> RetrievalBackend:
        """Construct the backend, or skip the test where it is unavailable.

        Args:
            lanes: independent sets of vectors.
            dim: length of every vector.
            options: take precedence over `backend_options`.
        """
        return self._construct(lanes, dim, {**self.backend_options, **options})

    def make_with_defaults(self, lanes: int, dim: int) -> RetrievalBackend:
        """Construct the backend as `make_backend` does, but with none of `backend_options`."""
        return self._construct(lanes, dim, {})

    def _construct(self, lanes: int, dim: int, options: Mapping[str, Any]) -> RetrievalBackend:
        registry = default_plugins().backends
        reason = registry.unavailable_reason(self.backend)
        if reason is not None:
            pytest.skip(reason)
        kind: Any = registry.get(self.backend)
        backend = kind(lanes=lanes, dim=dim, device=self.device, **options)
        assert isinstance(backend, RetrievalBackend)
        return backend

    def empty(self, *, lanes: int, dim: int) -> tuple[RetrievalBackend, PlainModel]:
        """Make a backend and its plain model."""
        return self.make_backend(lanes, dim), PlainModel(lanes=lanes, dim=dim)

    def filled(self, *, lanes: int, dim: int, n: int) -> tuple[RetrievalBackend, PlainModel]:
        """Make a backend and its plain model with ``n`` random vectors in every lane."""
        backend, model = self.empty(lanes=lanes, dim=dim)
        self.add(backend, model, random_vectors((lanes, n, dim), seed=0))
        return backend, model

    def add(
        self,
        backend: RetrievalBackend,
        model: PlainModel,
        keys: Tensor,
        lanes: Sequence[int] | None = None,
    ) -> None:
        """Add to both."""
        backend.add(keys.to(self.device), lanes)
        model.add(keys, range(backend.lanes) if lanes is None else lanes)

    def remove_oldest(
        self,
        backend: RetrievalBackend,
        model: PlainModel,
        n: int,
        lanes: Sequence[int] | None = None,
    ) -> None:
        """Remove from both."""
        backend.remove_oldest(n, lanes)
        model.remove_oldest(n, range(backend.lanes) if lanes is None else lanes)

    def clear(self, backend: RetrievalBackend, model: PlainModel, lanes: Sequence[int]) -> None:
        """Clear lanes of both."""
        backend.clear(lanes)
        model.clear(lanes)

    def assert_agrees(
        self, backend: RetrievalBackend, model: PlainModel, queries: Tensor, k: int
    ) -> SearchResult:
        """Search, and hold every part of the answer against float64 products."""
        result = self.checked_search(backend, model, queries, k)
        found = wanted = 0
        for lane, keys in enumerate(model.keys):
            products = queries[lane].cpu().double() @ keys.T
            expected = min(k, len(keys))
            found += self._count_found(
                result.scores[lane, :, :expected].cpu().double(),
                result.ids[lane, :, :expected].cpu() - model.first_ids[lane],
                products,
            )
            wanted += expected * len(products)
        assert found >= self.minimum_recall * wanted
        return result

    def checked_search(
        self, backend: RetrievalBackend, model: PlainModel, queries: Tensor, k: int
    ) -> SearchResult:
        """Search, and check all but the ranking: shapes, dtypes, device, counts and padding."""
        assert backend.counts().tolist() == model.counts()
        on_device = queries.to(self.device)
        result = backend.search(on_device, k)
        shape = (backend.lanes, queries.shape[1], k)
        assert tuple(result.scores.shape) == tuple(result.ids.shape) == shape
        assert (result.scores.dtype, result.ids.dtype) == (torch.float32, torch.int64)
        assert result.scores.device == result.ids.device == on_device.device
        for lane, count in enumerate(model.counts()):
            assert (result.ids[lane, :, count:] == -1).all()
            assert (result.scores[lane, :, count:] == -math.inf).all()
        return result

    def _count_found(self, scores: Tensor, positions: Tensor, products: Tensor) -> int:
        """Check one lane's scores ``(q, k)`` and count those that are among the true top ``k``."""
        if not scores.numel():
            return 0
        assert (positions >= 0).all(), "an id that is evicted, or a gap before the last vector"
        assert (positions < products.shape[1]).all(), "an id that was never given"
        in_order = positions.sort(-1).values
        assert (in_order[:, 1:] > in_order[:, :-1]).all(), "one vector found twice"
        true = products.gather(1, positions)
        slack = self.score_tolerance * (1 + true.abs())
        assert ((scores - true).abs() <= slack).all(), "a score that is not its vector's product"
        assert (scores[:, 1:] <= scores[:, :-1]).all(), "scores that do not fall"
        kth = products.topk(scores.shape[1]).values[:, -1:]
        return int((true >= kth - slack).sum())

    def assert_each_finds_itself(self, backend: RetrievalBackend, model: PlainModel) -> None:
        """Search for every stored vector, all of unit length: it, or its equal, must come first."""
        longest = max(model.counts())
        queries = torch.zeros(backend.lanes, longest, backend.dim, dtype=torch.float64)
        for lane, keys in enumerate(model.keys):
            queries[lane, : len(keys)] = keys
        best = backend.search(queries.to(self.device), 1).ids[..., 0].cpu()
        for lane, keys in enumerate(model.keys):
            positions = best[lane, : len(keys)] - model.first_ids[lane]
            inside = (positions >= 0) & (positions < len(keys))
            itself = keys[positions.where(inside, 0)] if len(keys) else keys
            right = inside & ((itself * keys).sum(-1) > 1 - self.score_tolerance)
            assert int(right.sum()) >= self.minimum_recall * len(keys)
