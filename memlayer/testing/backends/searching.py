"""That a search finds what exact search finds, whatever lanes, sizes and ``k`` are."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import pytest
import torch

from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import clustered_vectors, random_vectors


class SearchTests(BackendCase):
    """Searches of vectors that were only ever added."""

    @pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (64, 64), (100, 1), (300, 17)])
    def test_search_finds_what_exact_search_finds(self, n: int, k: int) -> None:
        backend, model = self.filled(lanes=3, dim=16, n=n)
        self.assert_agrees(backend, model, random_vectors((3, 9, 16), seed=1), k)

    def test_long_lanes_are_searched_as_well_as_short_ones(self) -> None:
        backend, model = self.empty(lanes=2, dim=16)
        keys = clustered_vectors(lanes=2, n=3000, dim=16, seed=0)
        queries = clustered_vectors(lanes=2, n=40, dim=16, seed=0, noise_seed=1)
        self.add(backend, model, keys[:, :2000])
        self.assert_agrees(backend, model, queries, 3)
        self.remove_oldest(backend, model, 1300)
        self.assert_agrees(backend, model, queries, 20)
        self.add(backend, model, keys[:, 2000:])
        self.assert_agrees(backend, model, queries, 20)

    def test_recall_is_reported_and_bounded(self, request: pytest.FixtureRequest) -> None:
        backend, model = self.empty(lanes=2, dim=32)
        self.add(backend, model, clustered_vectors(lanes=2, n=1500, dim=32, seed=0))
        # Elsewhere than the keys, as queries of a real model are.
        queries = clustered_vectors(lanes=2, n=64, dim=32, seed=0, noise_seed=1, spread=1.0) + 0.5
        result = self.assert_agrees(backend, model, queries, 16)
        recall = result.recall(model.search(queries.to(self.device), 16))
        # Not record_property: it warns under --junitxml, and warnings may be errors.
        request.node.user_properties.append(("recall", recall))
        print(f"recall {recall:.4f} of 16 among 1500 vectors a lane")

    def test_one_query_finds_what_it_finds_among_many(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=50)
        queries = random_vectors((2, 33, 8), seed=1)
        self.assert_agrees(backend, model, queries, 5)
        self.assert_agrees(backend, model, queries[:, 7:8], 5)

    def test_lanes_with_fewer_than_k_vectors_are_padded(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=3)
        result = self.assert_agrees(backend, model, random_vectors((2, 5, 4), seed=1), 10)
        assert (result.ids[..., 3:] == -1).all()
        assert (result.ids[..., :3] >= 0).all()

    def test_a_k_of_all_vectors_finds_all(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=700)
        result = self.assert_agrees(backend, model, random_vectors((2, 3, 8), seed=1), 700)
        assert result.ids.sort(-1).values.tolist() == [[list(range(700))] * 3] * 2

    def test_a_k_beyond_anything_stored_is_padded(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=20)
        self.assert_agrees(backend, model, random_vectors((2, 2, 4), seed=1), 5000)

    def test_an_empty_backend_gives_padding_only(self) -> None:
        backend, model = self.empty(lanes=2, dim=4)
        self.assert_agrees(backend, model, random_vectors((2, 5, 4), seed=1), 3)

    def test_lanes_of_unequal_length_do_not_mix(self) -> None:
        backend, model = self.empty(lanes=4, dim=8)
        for lane, n in ((0, 30), (1, 2), (3, 70)):
            self.add(backend, model, random_vectors((1, n, 8), seed=lane), [lane])
        self.assert_agrees(backend, model, random_vectors((4, 6, 8), seed=9), 5)

    def test_an_empty_lane_among_full_ones_finds_nothing(self) -> None:
        backend, model = self.filled(lanes=5, dim=8, n=90)
        self.clear(backend, model, [3])
        self.remove_oldest(backend, model, 90, [0])
        result = self.assert_agrees(backend, model, random_vectors((5, 6, 8), seed=1), 7)
        assert (result.ids[[0, 3]] == -1).all()
        assert (result.ids[[1, 2, 4]] >= 0).all()

    def test_many_lanes_of_few_vectors_do_not_mix(self) -> None:
        backend, model = self.empty(lanes=64, dim=4)
        for lane in range(64):
            self.add(backend, model, random_vectors((1, lane % 5, 4), seed=lane), [lane])
        self.assert_agrees(backend, model, random_vectors((64, 3, 4), seed=99), 4)

    def test_lanes_are_taken_in_the_order_given(self) -> None:
        backend, model = self.empty(lanes=3, dim=8)
        self.add(backend, model, random_vectors((2, 5, 8), seed=0), [2, 0])
        self.assert_agrees(backend, model, random_vectors((3, 4, 8), seed=1), 5)

    def test_a_search_changes_neither_queries_nor_contents(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=20)
        queries = random_vectors((2, 3, 4), seed=1).to(self.device)
        before = queries.clone()
        first, second = backend.search(queries, 5), backend.search(queries, 5)
        assert torch.equal(queries, before)
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.scores, second.scores)
        assert backend.counts().tolist() == model.counts()

    def test_a_result_stays_what_it_was_when_the_backend_goes_on(self) -> None:
        backend, _ = self.filled(lanes=2, dim=4, n=20)
        result = backend.search(random_vectors((2, 3, 4), seed=1).to(self.device), 5)
        counts = backend.counts()
        ids, scores = result.ids.clone(), result.scores.clone()
        backend.search(random_vectors((2, 3, 4), seed=2).to(self.device), 5)
        backend.remove_oldest(20)
        backend.add(random_vectors((2, 30, 4), seed=3).to(self.device))
        assert torch.equal(result.ids, ids)
        assert torch.equal(result.scores, scores)
        assert counts.tolist() == [20, 20]
