"""That ids mean the same vectors whatever was added, removed and cleared meanwhile."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import torch

from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors, unit_vectors


class ContentTests(BackendCase):
    """Searches of what changes."""

    def test_ids_stay_what_they_were_after_eviction(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=40)
        self.remove_oldest(backend, model, 13)
        self.assert_agrees(backend, model, random_vectors((2, 6, 8), seed=1), 27)
        self.add(backend, model, random_vectors((2, 13, 8), seed=2))
        self.assert_agrees(backend, model, random_vectors((2, 6, 8), seed=1), 40)

    def test_lanes_evicted_alone_keep_their_own_numbers(self) -> None:
        backend, model = self.filled(lanes=3, dim=8, n=40)
        self.remove_oldest(backend, model, 25, [1])
        self.add(backend, model, random_vectors((2, 9, 8), seed=1), [1, 2])
        self.remove_oldest(backend, model, 3, [2, 0])
        self.assert_agrees(backend, model, random_vectors((3, 6, 8), seed=2), 50)

    def test_every_vector_of_a_full_backend_finds_itself(self) -> None:
        backend, model = self.empty(lanes=2, dim=16)
        for step in range(12):
            self.add(backend, model, unit_vectors((2, 7, 16), seed=step))
            if step >= 4:
                self.remove_oldest(backend, model, 7)
                self.assert_each_finds_itself(backend, model)

    def test_a_full_backend_stays_right_for_many_turns(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=150)
        for turn in range(40):
            self.remove_oldest(backend, model, 17)
            self.add(backend, model, random_vectors((2, 17, 8), seed=turn + 1))
            if turn % 8 == 7:
                self.assert_agrees(backend, model, random_vectors((2, 3, 8), seed=99), 5)
        self.assert_agrees(backend, model, random_vectors((2, 3, 8), seed=98), 150)

    def test_more_vectors_than_are_stored_can_be_added_at_once(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=20)
        self.remove_oldest(backend, model, 15)
        self.add(backend, model, random_vectors((2, 400, 8), seed=1))
        self.assert_agrees(backend, model, random_vectors((2, 3, 8), seed=2), 5)

    def test_lanes_emptied_by_removal_count_on(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=12)
        self.remove_oldest(backend, model, 12)
        self.assert_agrees(backend, model, random_vectors((2, 3, 8), seed=1), 2)
        self.add(backend, model, random_vectors((2, 4, 8), seed=2))
        result = self.assert_agrees(backend, model, random_vectors((2, 3, 8), seed=1), 4)
        assert result.ids.min() == 12

    def test_clear_starts_the_numbers_of_that_lane_again(self) -> None:
        backend, model = self.filled(lanes=3, dim=8, n=10)
        self.clear(backend, model, [1])
        self.add(backend, model, random_vectors((3, 4, 8), seed=1))
        result = self.assert_agrees(backend, model, random_vectors((3, 2, 8), seed=2), 14)
        assert result.ids[1].max() == 3

    def test_clear_without_lanes_drops_everything(self) -> None:
        backend, model = self.filled(lanes=3, dim=8, n=10)
        backend.clear()
        model.clear(range(3))
        self.assert_agrees(backend, model, random_vectors((3, 2, 8), seed=1), 3)
        self.add(backend, model, random_vectors((3, 4, 8), seed=2))
        self.assert_agrees(backend, model, random_vectors((3, 2, 8), seed=1), 3)

    def test_what_is_stored_is_a_copy(self) -> None:
        backend, model = self.empty(lanes=1, dim=4)
        for seed in range(2):
            keys = random_vectors((1, 8, 4), seed=seed).to(self.device)
            backend.add(keys)
            model.add(keys, [0])
            keys.zero_()
        self.assert_agrees(backend, model, random_vectors((1, 3, 4), seed=2), 3)

    def test_what_was_added_in_inference_mode_can_be_changed_outside_of_it(self) -> None:
        backend, model = self.empty(lanes=1, dim=4)
        with torch.inference_mode():
            self.add(backend, model, random_vectors((1, 6, 4), seed=0))
        self.remove_oldest(backend, model, 3)
        self.add(backend, model, random_vectors((1, 3, 4), seed=1))
        self.assert_agrees(backend, model, random_vectors((1, 2, 4), seed=2), 6)
