"""That tensors of every form are read as what they hold."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import pytest
import torch

from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors


class InputTests(BackendCase):
    """Keys and queries of other dtypes, strides and sizes, and from other contexts."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_every_float_dtype_is_searched_as_exactly_as_it_is(self, dtype: torch.dtype) -> None:
        backend, model = self.empty(lanes=2, dim=8)
        self.add(backend, model, random_vectors((2, 40, 8), seed=0).to(dtype))
        self.assert_agrees(backend, model, random_vectors((2, 5, 8), seed=1).to(dtype), 6)

    def test_float32_is_not_rounded_to_less(self) -> None:
        if not self.keeps_float32:
            pytest.skip("the options ask for less than float32")
        backend, model = self.empty(lanes=1, dim=4)
        # 1, 1 + 2**-20, 1 + 2**-19 ...: all the same in half precision.
        keys = torch.zeros(1, 16, 4)
        keys[..., 0] = 1 + torch.arange(16) * 2.0**-20
        self.add(backend, model, keys)
        queries = torch.zeros(1, 1, 4)
        queries[..., 0] = 1.0
        result = self.checked_search(backend, model, queries, 16)
        assert result.scores[0, 0].cpu().tolist() == keys[0, :, 0].flip(0).tolist()
        assert result.ids.tolist() == [[list(range(15, -1, -1))]]

    def test_autocast_changes_nothing(self) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=40)
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16):
            self.assert_agrees(backend, model, random_vectors((2, 5, 8), seed=1), 6)

    def test_tensors_that_are_not_contiguous_are_read_right(self) -> None:
        backend, model = self.empty(lanes=2, dim=6)
        self.add(backend, model, random_vectors((6, 30, 2), seed=0).transpose(0, 2))
        self.add(backend, model, random_vectors((2, 30, 12), seed=1)[:, ::3, ::2])
        self.add(backend, model, random_vectors((1, 4, 6), seed=2).expand(2, -1, -1))
        self.assert_agrees(backend, model, random_vectors((6, 5, 2), seed=3).transpose(0, 2), 4)

    def test_empty_tensors_are_fine(self) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=5)
        self.add(backend, model, torch.empty(2, 0, 4))
        self.add(backend, model, torch.empty(0, 3, 4), [])
        self.remove_oldest(backend, model, 0)
        self.remove_oldest(backend, model, 4, [])
        self.clear(backend, model, [])
        self.assert_agrees(backend, model, torch.empty(2, 0, 4), 3)
        self.assert_agrees(backend, model, random_vectors((2, 2, 4), seed=1), 3)

    def test_vectors_of_one_element_are_searched(self) -> None:
        backend, model = self.filled(lanes=2, dim=1, n=9)
        self.assert_agrees(backend, model, random_vectors((2, 4, 1), seed=1), 3)

    def test_no_gradient_flows_through_add_and_search(self) -> None:
        backend = self.make_backend(lanes=1, dim=4)
        backend.add(random_vectors((1, 6, 4), seed=0).to(self.device).requires_grad_())
        queries = random_vectors((1, 2, 4), seed=1).to(self.device).requires_grad_()
        result = backend.search(queries, 2)
        assert not result.scores.requires_grad
