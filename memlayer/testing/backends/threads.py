"""That searches may run at the same time, as the contract promises."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors

if TYPE_CHECKING:
    from memlayer.retrieval import RetrievalBackend, SearchResult

THREADS = 6
SEARCHES = 25
"""Searches of each thread, one right after the other."""


class ThreadTests(BackendCase):
    """Several threads that read one backend."""

    def test_searches_at_the_same_time_find_what_each_finds_alone(self) -> None:
        # Two alike: one is searched by one thread, the other was never searched before.
        alone, _ = self.filled(lanes=3, dim=8, n=200)
        shared, model = self.filled(lanes=3, dim=8, n=200)
        requests = [
            (random_vectors((3, 1 + thread * 5, 8), seed=thread).to(self.device), 1 + 4 * thread)
            for thread in range(THREADS)
        ]
        expected = [alone.search(*request) for request in requests]
        for (queries, _), results, right in zip(
            requests, _search_together(shared, requests), expected, strict=True
        ):
            for result in results:
                assert torch.equal(result.ids, right.ids)
                torch.testing.assert_close(result.scores, right.scores)
            self.assert_agrees(shared, model, queries, 3)

    def test_saving_while_others_search_saves_the_contents(self, tmp_path: Path) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=100)
        self.remove_oldest(backend, model, 30)
        queries = random_vectors((2, 5, 8), seed=1)
        with _switching_often(), ThreadPoolExecutor(3) as pool:
            searches = [
                pool.submit(backend.search, queries.to(self.device), 5) for _ in range(SEARCHES)
            ]
            pool.submit(backend.save, tmp_path).result()
            counts = pool.submit(backend.counts).result()
        right = self.assert_agrees(backend, model, queries, 5)
        assert all(torch.equal(search.result().ids, right.ids) for search in searches)
        assert counts.tolist() == model.counts()
        loaded = self.make_backend(lanes=2, dim=8)
        loaded.load(tmp_path)
        self.assert_agrees(loaded, model, queries, 5)


def _search_together(
    backend: RetrievalBackend, requests: list[tuple[Tensor, int]]
) -> list[list[SearchResult]]:
    """Repeat each request in a thread of its own, all of them starting together."""
    start = Barrier(len(requests))

    def search(request: tuple[Tensor, int]) -> list[SearchResult]:
        start.wait(timeout=60)
        return [backend.search(*request) for _ in range(SEARCHES)]

    with _switching_often(), ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(search, requests))


@contextmanager
def _switching_often() -> Iterator[None]:
    """Let threads interrupt each other after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
