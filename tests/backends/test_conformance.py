"""Every built-in backend against the suite that third parties run."""

from typing import Any, ClassVar

import pytest
import torch

from memlayer.benchmarking import BackendSetup, Machine, MeasuredTable, Measurement, SearchTime
from memlayer.testing import BackendConformance
from memlayer_backends import _auto_plan
from memlayer_backends.auto import AutoBackend


class TestTorch(BackendConformance):
    backend = "torch"


class TestTorchInSmallBlocks(BackendConformance):
    backend = "torch"
    random_sequences = 10
    backend_options: ClassVar[dict[str, Any]] = {"block_megabytes": 1}


class TestTorchInHalfWidth(BackendConformance):
    backend = "torch"
    backend_options: ClassVar[dict[str, Any]] = {"storage": "bfloat16"}
    minimum_recall = 0.95
    keeps_float32 = False
    score_tolerance = 2**-5  # eight bits a number, and sums that nearly cancel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
class TestTorchOnAGpu(BackendConformance):
    backend = "torch"
    device = "cuda"


class TestFaiss(BackendConformance):
    backend = "faiss"


class TestFaissInLists(BackendConformance):
    backend = "faiss"
    backend_options: ClassVar[dict[str, Any]] = {"index": "ivf", "exact_below": 1}
    minimum_recall = 0.95


class TestFaissGpu(BackendConformance):
    backend = "faiss-gpu"
    device = "cuda"


class TestHnswlib(BackendConformance):
    backend = "hnswlib"
    minimum_recall = 0.95
    random_sequences = 10  # too few vectors for a graph


class TestHnswlibWithGraphsFromTheStart(BackendConformance):
    backend = "hnswlib"
    backend_options: ClassVar[dict[str, Any]] = {"exact_below": 1}
    minimum_recall = 0.95


class TestAuto(BackendConformance):
    backend = "auto"
    random_sequences = 10


def table_of(*best: str) -> MeasuredTable:
    """Make backends the best for up to 64, for up to 256 and for more vectors a lane."""
    setups = [BackendSetup.parse(text) for text in best]
    return MeasuredTable(
        machine=Machine(processor="Engine", device="cpu", threads=2, python="3", libraries={}),
        date="2026-01-01",
        vectors="made up",
        lanes=1,
        dim=4,
        k=2,
        measurements=tuple(
            Measurement(
                setup=setup,
                size=size,
                exact=setup.name != "hnswlib",
                recall=1.0,
                recall_after_turn=1.0,
                add=0.0,
                append=0.0,
                search=(SearchTime(queries=1, seconds=seconds, low=seconds, high=seconds),),
            )
            for setup in setups
            for size, favourite in zip((32, 128, 512), setups, strict=True)
            for seconds in (1.0 if setup is favourite else 2.0,)
        ),
    )


class _ChangingAuto(BackendConformance):
    """``auto`` by a table that makes it change at 64 and at 256 vectors a lane."""

    backend = "auto"

    @pytest.fixture(autouse=True)
    def changing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_auto_plan, "find_table", lambda _: self.table())

    def table(self) -> MeasuredTable:
        raise NotImplementedError


class TestAutoThatChanges(_ChangingAuto):
    def table(self) -> MeasuredTable:
        return table_of("torch", "faiss", "torch:block_megabytes=1")


class TestAutoThatChangesApproximately(_ChangingAuto):
    backend_options: ClassVar[dict[str, Any]] = {"approximate": True}
    minimum_recall = 0.95

    def table(self) -> MeasuredTable:
        return table_of("torch", "hnswlib:exact_below=1", "faiss")


def test_auto_changes_where_the_suite_says_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = TestAutoThatChangesApproximately()
    monkeypatch.setattr(_auto_plan, "find_table", lambda _: suite.table())
    backend = suite.make_backend(lanes=1, dim=4)
    assert isinstance(backend, AutoBackend)
    choices = []
    for count in (63, 1, 191, 1):
        backend.add(torch.ones(1, count, 4))
        choices.append(backend.choice)
    assert choices == ["torch", "hnswlib:exact_below=1", "hnswlib:exact_below=1", "faiss"]
