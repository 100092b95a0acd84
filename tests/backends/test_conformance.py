"""Every built-in backend against the suite that third parties run."""

from typing import Any, ClassVar

from memlayer.testing import BackendConformance


class TestTorch(BackendConformance):
    backend = "torch"


class TestTorchInSmallBlocks(BackendConformance):
    backend = "torch"
    random_sequences = 10
    backend_options: ClassVar[dict[str, Any]] = {"block_megabytes": 1}


class TestFaiss(BackendConformance):
    backend = "faiss"


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
