"""Which vectors come first: order, equal scores, and numbers that strain float32."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import math

import pytest
import torch

from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors


class RankingTests(BackendCase):
    """Searches whose right answer can be told without another search."""

    def test_results_come_best_first(self) -> None:
        backend, model = self.empty(lanes=1, dim=4)
        lengths = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])
        self.add(backend, model, torch.nn.functional.pad(lengths[None, :, None], (0, 3)))
        result = self.assert_agrees(backend, model, torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), 5)
        assert result.ids.tolist() == [[[1, 3, 4, 0, 2]]]
        assert result.scores.tolist() == [[[9.0, 7.0, 5.0, 3.0, 1.0]]]

    def test_equal_vectors_have_ids_of_their_own(self) -> None:
        backend, model = self.empty(lanes=2, dim=4)
        self.add(backend, model, torch.ones(2, 6, 4))
        result = self.assert_agrees(backend, model, torch.ones(2, 2, 4), 6)
        assert result.ids.sort(-1).values.tolist() == [[list(range(6))] * 2] * 2

    def test_equal_scores_do_not_hide_a_better_vector(self) -> None:
        backend, model = self.empty(lanes=2, dim=4)
        keys = torch.zeros(2, 60, 4)
        keys[..., 0] = 1.0  # all alike, seen from the query below
        keys[..., 1:] = random_vectors((2, 60, 3), seed=0)
        better = [0, 31, 59]
        keys[:, better, 0] = torch.tensor([2.0, 4.0, 3.0])
        self.add(backend, model, keys)
        queries = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(2, 2, 4)
        for k in (3, 10):
            result = self.assert_agrees(backend, model, queries, k)
            assert result.ids[..., :3].tolist() == [[[31, 59, 0]] * 2] * 2

    def test_a_query_of_zeros_finds_any_vectors_with_score_zero(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=30)
        result = self.assert_agrees(backend, model, torch.zeros(2, 3, 4), 5)
        assert (result.scores == 0).all()

    def test_negative_scores_are_found_too(self) -> None:
        backend, model = self.empty(lanes=1, dim=4)
        self.add(backend, model, -random_vectors((1, 20, 4), seed=0).abs())
        self.remove_oldest(backend, model, 5)
        self.assert_agrees(backend, model, torch.ones(1, 3, 4), 4)

    def test_a_query_that_is_not_finite_finds_nothing(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=10)
        queries = random_vectors((2, 3, 4), seed=1)
        spoiled = queries.clone()
        spoiled[0, 1, 2], spoiled[1, 0, 0] = math.nan, math.inf
        result = backend.search(spoiled.to(self.device), 3)
        for lane, query in ((0, 1), (1, 0)):
            assert result.ids[lane, query].tolist() == [-1] * 3
            assert result.scores[lane, query].tolist() == [-math.inf] * 3
        expected = self.assert_agrees(backend, model, queries, 3)
        assert result.ids[0, 0].tolist() == expected.ids[0, 0].tolist()

    @pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e3, 1e20])
    def test_keys_of_any_magnitude_are_told_apart_by_an_exact_search(
        self, magnitude: float
    ) -> None:
        backend, model = self.empty(lanes=2, dim=8)
        self.add(backend, model, magnitude * random_vectors((2, 40, 8), seed=0))
        queries = random_vectors((2, 5, 8), seed=1) / magnitude
        if self.minimum_recall == 1:
            self.assert_agrees(backend, model, queries, 6)
        else:  # distances that an engine computes between tiny keys may be all alike
            result = self.checked_search(backend, model, queries, 6)
            assert ((result.ids >= 0) & (result.ids < 40)).all()

    @pytest.mark.parametrize("magnitude", [1e-30, 1e30])
    def test_products_beyond_float32_give_no_nan_and_no_infinite_score(
        self, magnitude: float
    ) -> None:
        backend, model = self.empty(lanes=2, dim=8)
        self.add(backend, model, magnitude * random_vectors((2, 40, 8), seed=0))
        result = self.checked_search(
            backend, model, magnitude * random_vectors((2, 5, 8), seed=1), 6
        )
        missing = result.ids == -1
        assert ((result.ids >= -1) & (result.ids < 40)).all()
        assert (result.scores[missing] == -math.inf).all()
        assert result.scores[~missing].isfinite().all()
