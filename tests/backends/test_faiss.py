import subprocess
import sys

import pytest
import torch

from memlayer import BackendUnavailableError, ConfigError
from memlayer_backends.faiss_cpu import FaissBackend
from memlayer_backends.faiss_gpu import FaissGpuBackend
from memlayer_backends.torch_exact import TorchBackend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_lane_that_wraps_around_and_is_not_full_is_searched_whole() -> None:
    pytest.importorskip("faiss")
    faiss, exact = FaissBackend(lanes=2, dim=8), TorchBackend(lanes=2, dim=8)
    for backend in (faiss, exact):
        backend.add(random(2, 100, 8))
        backend.remove_oldest(60)
        backend.add(random(2, 50, 8, seed=1))
        backend.remove_oldest(10, [1])
    assert len(faiss.buffer.pieces(0)) == 2
    queries = random(2, 9, 8, seed=2)
    expected = exact.search(queries, 70)
    result = faiss.search(queries, 70)
    assert torch.equal(result.ids[0], expected.ids[0])
    torch.testing.assert_close(result.scores, expected.scores)


def test_faiss_is_not_imported_before_it_searches() -> None:
    code = (
        "import sys, memlayer_backends.faiss_cpu as f, memlayer_backends.faiss_gpu;"
        "f.FaissBackend.unavailable_reason(); print('faiss' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_faiss_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BackendUnavailableError) as caught:
        FaissBackend(lanes=1, dim=1)
    assert str(caught.value) == 'faiss is not installed: pip install "memlayer-lm[faiss]"'
    with pytest.raises(BackendUnavailableError) as caught:
        FaissGpuBackend(lanes=1, dim=1)
    assert str(caught.value) == 'faiss is not installed: pip install "memlayer-lm[faiss-gpu]"'


def test_a_faiss_without_gpu_support_is_told_apart_from_a_missing_one() -> None:
    faiss = pytest.importorskip("faiss")
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has GPU support")
    with pytest.raises(BackendUnavailableError) as caught:
        FaissGpuBackend(lanes=1, dim=1)
    assert str(caught.value) == (
        "faiss is installed without GPU support: pip uninstall faiss-cpu && "
        'pip install "memlayer-lm[faiss-gpu]"'
    )


def test_a_missing_gpu_is_told_apart_from_a_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faiss = pytest.importorskip("faiss")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    assert FaissGpuBackend.unavailable_reason() == (
        "torch finds no CUDA device here: use backend 'faiss' or 'torch'"
    )


def test_a_gpu_that_only_torch_sees_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = FaissGpuBackend.unavailable_reason()
    assert reason is not None
    assert reason.startswith("faiss finds no CUDA device here, though torch does")


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before a GPU is touched can be tried without one."""
    monkeypatch.setattr(FaissGpuBackend, "unavailable_reason", classmethod(lambda cls: None))


@pytest.mark.usefixtures("available")
def test_faiss_gpu_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        FaissGpuBackend(lanes=1, dim=1, device="cpu")
    assert str(caught.value) == (
        "backend 'faiss-gpu' needs a CUDA device, got device='cpu'; move the model there or use "
        "backend 'faiss'"
    )


@pytest.mark.usefixtures("available")
def test_faiss_gpu_names_its_options() -> None:
    with pytest.raises(ConfigError, match="no option 'tmp'; known: temp_memory_megabytes"):
        FaissGpuBackend(lanes=1, dim=1, tmp=1)


def test_more_than_faiss_finds_on_a_gpu_is_refused() -> None:
    # The check comes before anything is asked of the GPU, so it needs no backend on one.
    backend = object.__new__(FaissGpuBackend)
    with pytest.raises(ConfigError, match="at most 2048 vectors per query, got k=2049"):
        backend._nearest(torch.zeros(1, 4), torch.zeros(3000, 4), 2049)
