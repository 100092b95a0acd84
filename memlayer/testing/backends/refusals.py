"""That what cannot be right is refused, and changes nothing."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import math

import pytest
import torch

from memlayer.errors import ConfigError, ShapeError
from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors


class RefusalTests(BackendCase):
    """A caller's mistakes."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_keys_that_are_not_finite_are_refused_and_nothing_is_stored(self, value: float) -> None:
        backend, model = self.filled(lanes=3, dim=4, n=5)
        keys = random_vectors((2, 6, 4), seed=1).to(self.device)
        keys[1, 4, 2] = value
        with pytest.raises(ShapeError):
            backend.add(keys, [0, 2])
        self.assert_agrees(backend, model, random_vectors((3, 2, 4), seed=2), 8)

    @pytest.mark.parametrize("shape", [(2, 4), (3, 1, 4), (2, 1, 5), (2, 1, 4, 1)])
    def test_keys_and_queries_of_another_shape_are_refused(self, shape: tuple[int, ...]) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=5)
        with pytest.raises(ShapeError):
            backend.add(torch.zeros(shape, device=self.device))
        with pytest.raises(ShapeError):
            backend.search(torch.zeros(shape, device=self.device), 1)
        assert backend.counts().tolist() == model.counts()

    def test_keys_and_queries_on_another_device_are_refused(self) -> None:
        backend, model = self.filled(lanes=1, dim=4, n=5)
        others = ["meta"] if torch.device(self.device).type == "cpu" else ["meta", "cpu"]
        for other in others:
            elsewhere = torch.zeros(1, 2, 4, device=other)
            with pytest.raises(ShapeError):
                backend.add(elsewhere)
            with pytest.raises(ShapeError):
                backend.search(elsewhere, 1)
        assert backend.counts().tolist() == model.counts()

    def test_keys_and_queries_of_whole_numbers_are_refused(self) -> None:
        backend = self.make_backend(lanes=1, dim=4)
        with pytest.raises(ShapeError):
            backend.add(torch.ones(1, 2, 4, dtype=torch.int64, device=self.device))
        with pytest.raises(ShapeError):
            backend.search(torch.ones(1, 2, 4, dtype=torch.int64, device=self.device), 1)

    @pytest.mark.parametrize("lanes", [[0, 0], [2], [-1]])
    def test_lanes_that_do_not_exist_or_repeat_are_refused(self, lanes: list[int]) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=5)
        keys = torch.zeros(len(lanes), 1, 4, device=self.device)
        with pytest.raises(ShapeError):
            backend.add(keys, lanes)
        with pytest.raises(ShapeError):
            backend.remove_oldest(1, lanes)
        with pytest.raises(ShapeError):
            backend.clear(lanes)
        assert backend.counts().tolist() == model.counts()

    def test_removing_more_than_a_lane_holds_is_refused_and_nothing_is_dropped(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=5)
        self.add(backend, model, random_vectors((1, 3, 4), seed=1), [0])
        with pytest.raises(ShapeError):
            backend.remove_oldest(6)
        self.assert_agrees(backend, model, random_vectors((2, 2, 4), seed=2), 9)

    def test_an_unknown_option_is_named(self) -> None:
        self.make_backend(lanes=1, dim=4)
        with pytest.raises(ConfigError, match="no_such_option"):
            self.make_backend(lanes=1, dim=4, no_such_option=1)

    @pytest.mark.parametrize("k", [0, -1])
    def test_a_k_below_one_is_refused(self, k: int) -> None:
        backend, _ = self.filled(lanes=1, dim=4, n=5)
        with pytest.raises(ConfigError):
            backend.search(random_vectors((1, 2, 4), seed=1).to(self.device), k)
