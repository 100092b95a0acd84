"""Float32 products stay float32 during a search, and the process's settings what they were."""

from collections.abc import Iterator

import pytest
import torch

from memlayer_backends._precision import full_precision
from memlayer_backends.torch_exact import TorchBackend


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_reduced_products_are_off_inside_and_as_before_behind(device: str, allowed: str) -> None:
    torch.set_float32_matmul_precision(allowed)
    setting = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    before = setting.matmul.fp32_precision
    with full_precision(torch.device(device)):
        assert setting.matmul.fp32_precision in ("none", "ieee")
    assert setting.matmul.fp32_precision == before
    assert torch.get_float32_matmul_precision() == allowed


def test_an_error_inside_leaves_the_settings_as_before() -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(KeyError), full_precision(torch.device("cuda")):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_a_search_on_a_gpu_is_exact_though_tf32_is_allowed(allowed: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 5000, 64, generator=generator)
    queries = torch.randn(2, 100, 64, generator=generator)
    torch.set_float32_matmul_precision(allowed)
    backend = TorchBackend(lanes=2, dim=64, device="cuda")
    backend.add(keys.cuda())
    result = backend.search(queries.cuda(), 8)
    expected = (queries.double() @ keys.double().transpose(1, 2)).topk(8)
    # TF32 keeps 11 bits: its products would be wrong by about 1e-2.
    torch.testing.assert_close(result.scores.cpu().double(), expected.values, rtol=1e-5, atol=1e-4)
