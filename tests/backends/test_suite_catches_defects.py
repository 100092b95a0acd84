"""The conformance suite against backends that are wrong in one way each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memlayer import RetrievalBackend, SearchResult
from memlayer.testing import BackendConformance
from memlayer_backends.torch_exact import TorchBackend


class OneOffAfterEviction(TorchBackend):
    def search(self, queries: Tensor, k: int) -> SearchResult:
        result = super().search(queries, k)
        evicted = (self.buffer.first_ids > 0)[:, None, None] & (result.ids >= 0)
        return SearchResult(scores=result.scores, ids=result.ids + evicted.long())


class SwappedLanes(TorchBackend):
    def search(self, queries: Tensor, k: int) -> SearchResult:
        result = super().search(queries.flip(0), k)
        return SearchResult(scores=result.scores.flip(0), ids=result.ids.flip(0))


class StaleIdsAfterLoad(TorchBackend):
    def load(self, directory: Path) -> None:
        super().load(directory)
        self.buffer.first_ids.zero_()


class MissesTheLastVector(TorchBackend):
    def search(self, queries: Tensor, k: int) -> SearchResult:
        result = super().search(queries, k)
        last = (self.buffer.first_ids + self.buffer.counts - 1)[:, None, None]
        missed = result.ids == last
        return SearchResult(
            scores=result.scores.masked_fill(missed, -torch.inf),
            ids=result.ids.masked_fill(missed, -1),
        )


class StoresWhateverComes(TorchBackend):
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        super().add(keys.nan_to_num(), lanes)


class HalfPrecision(TorchBackend):
    def add(self, keys: Tensor, lanes: Sequence[int] | None = None) -> None:
        super().add(keys.bfloat16(), lanes)


def suite_over(kind: type[TorchBackend]) -> BackendConformance:
    class Suite(BackendConformance):
        def make_backend(self, lanes: int, dim: int, **options: Any) -> RetrievalBackend:
            return kind(lanes=lanes, dim=dim, **options)

    return Suite()


CASES: list[tuple[type[TorchBackend], Callable[[BackendConformance, Path], None]]] = [
    (OneOffAfterEviction, lambda suite, _: suite.test_ids_stay_what_they_were_after_eviction()),
    (
        OneOffAfterEviction,
        lambda suite, _: suite.test_every_vector_of_a_full_backend_finds_itself(),
    ),
    (SwappedLanes, lambda suite, _: suite.test_lanes_of_unequal_length_do_not_mix()),
    (SwappedLanes, lambda suite, _: suite.test_lanes_are_taken_in_the_order_given()),
    (
        StaleIdsAfterLoad,
        lambda suite, place: suite.test_what_is_loaded_answers_and_counts_on_as_what_was_saved(
            place
        ),
    ),
    (MissesTheLastVector, lambda suite, _: suite.test_search_finds_what_exact_search_finds(7, 3)),
    (MissesTheLastVector, lambda suite, _: suite.test_random_steps_agree_with_a_plain_model(0)),
    (HalfPrecision, lambda suite, _: suite.test_search_finds_what_exact_search_finds(100, 1)),
]


@pytest.mark.parametrize(("kind", "check"), CASES)
def test_a_planted_defect_fails_the_suite(
    kind: type[TorchBackend], check: Callable[[BackendConformance, Path], None], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        check(suite_over(kind), tmp_path)


@pytest.mark.parametrize(("kind", "check"), CASES)
def test_the_same_check_passes_without_the_defect(
    kind: type[TorchBackend], check: Callable[[BackendConformance, Path], None], tmp_path: Path
) -> None:
    check(suite_over(TorchBackend), tmp_path)


def test_a_backend_that_stores_nan_fails_the_suite() -> None:
    suite = suite_over(StoresWhateverComes)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        suite.test_keys_that_are_not_finite_are_refused_and_nothing_is_stored(float("nan"))
