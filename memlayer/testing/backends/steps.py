"""Thousands of random steps, each followed by the question whether every vector finds itself."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, configuration, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors, unit_vectors

if TYPE_CHECKING:
    import pytest

LANES, DIM = 3, 8

Lanes = st.lists(st.sampled_from(range(LANES)), min_size=1, max_size=LANES, unique=True)
Numbers = st.integers(0, 20)
Seeds = st.integers(0, 999)
"""Few, so that equal vectors meet."""


class RandomStepTests(BackendCase):
    """Any interleaving of the operations."""

    def test_any_sequence_of_steps_agrees_with_a_plain_model(
        self, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        suite = self
        self.make_backend(lanes=1, dim=1)  # skips where there is none
        steps = 0

        class Steps(BackendSteps):
            def __init__(self) -> None:
                super().__init__(suite, tmp_path / "saved")

            def teardown(self) -> None:
                nonlocal steps
                steps += self.steps

        with _hypothesis_files_in(tmp_path):
            run_state_machine_as_test(
                Steps,
                settings=settings(
                    max_examples=self.random_sequences,
                    stateful_step_count=50,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    print_blob=False,
                    phases=[Phase.generate, *[Phase.shrink] * self.shortest_failure],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        request.node.user_properties.append(("steps", steps))


class BackendSteps(RuleBasedStateMachine):
    """A backend and a plain model that take the same steps.

    Attributes:
        steps: how many were taken.
    """

    def __init__(self, suite: BackendCase, directory: Path) -> None:
        super().__init__()
        self.steps = 0
        self._suite = suite
        self._directory = directory
        self._backend, self._model = suite.empty(lanes=LANES, dim=DIM)

    @rule(lanes=Lanes, n=Numbers, seed=Seeds)
    def add(self, lanes: list[int], n: int, seed: int) -> None:
        keys = unit_vectors((len(lanes), n, DIM), seed=seed)
        self._suite.add(self._backend, self._model, keys, lanes)

    @rule(lanes=Lanes, n=Numbers)
    def remove_oldest(self, lanes: list[int], n: int) -> None:
        n = min(n, *(self._model.counts()[lane] for lane in lanes))
        self._suite.remove_oldest(self._backend, self._model, n, lanes)

    @rule(n=Numbers, seed=Seeds)
    def replace_the_oldest(self, n: int, seed: int) -> None:
        n = min(n, *self._model.counts())
        self._suite.remove_oldest(self._backend, self._model, n)
        self._suite.add(self._backend, self._model, unit_vectors((LANES, n, DIM), seed=seed))

    @rule(lanes=Lanes)
    def clear(self, lanes: list[int]) -> None:
        self._suite.clear(self._backend, self._model, lanes)

    @rule(q=st.integers(0, 3), k=st.integers(1, 30), seed=Seeds)
    def search(self, q: int, k: int, seed: int) -> None:
        queries = random_vectors((LANES, q, DIM), seed=seed)
        self._suite.assert_agrees(self._backend, self._model, queries, k)

    @rule(anew=st.booleans())
    def save_and_load(self, anew: bool) -> None:
        self._directory.mkdir(exist_ok=True)
        self._backend.save(self._directory)
        if anew:
            self._backend = self._suite.make_backend(lanes=LANES, dim=DIM)
        self._backend.load(self._directory)

    @invariant()
    def every_vector_finds_itself(self) -> None:
        self.steps += 1
        assert self._backend.counts().tolist() == self._model.counts()
        if any(self._model.counts()):
            self._suite.assert_each_finds_itself(self._backend, self._model)


@contextmanager
def _hypothesis_files_in(directory: Path) -> Iterator[None]:
    """Keep what hypothesis writes for itself out of the directory that the tests run in."""
    before: Any = configuration.storage_directory(intent_to_write=False).home_directory
    configuration.set_hypothesis_home_dir(directory / "hypothesis")
    try:
        yield
    finally:
        configuration.set_hypothesis_home_dir(before)
