import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memlayer.errors import ConfigError, ShapeError
from memlayer_backends.torch_exact import TorchBackend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_block_size_changes_no_result() -> None:
    keys, queries = random(4, 5000, 16), random(4, 300, 16, seed=1)
    results = []
    for megabytes in (1, 7, 1024):
        backend = TorchBackend(lanes=4, dim=16, block_megabytes=megabytes)
        backend.add(keys)
        results.append(backend.search(queries, 9))
    for other in results[1:]:
        assert torch.equal(other.ids, results[0].ids)
        # The product of another number of queries may round another way.
        torch.testing.assert_close(other.scores, results[0].scores)


def test_scores_of_all_queries_never_exist_at_once() -> None:
    lanes, n, q, megabytes = 2, 4096, 1024, 2
    backend = TorchBackend(lanes=lanes, dim=8, block_megabytes=megabytes)
    backend.add(random(lanes, n, 8))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        backend.search(random(lanes, q, 8, seed=1), 4)
    largest = max(event.cpu_memory_usage for event in profiled.events())
    # All scores would take 32 MiB; results and group maxima come on top of the 2 of a block.
    assert largest < 4 * megabytes * 2**20 < 4 * lanes * n * q


def test_a_full_ring_neither_grows_nor_moves() -> None:
    backend = TorchBackend(lanes=2, dim=8)
    backend.add(random(2, 1000, 8))
    place = backend.buffer.keys.data_ptr()
    for step in range(50):
        backend.remove_oldest(70)
        backend.add(random(2, 70, 8, seed=step))
    assert backend.buffer.keys.data_ptr() == place
    assert backend.buffer.occupancy().n_slots == 1024


def test_a_full_ring_allocates_for_the_new_vectors_only() -> None:
    backend = TorchBackend(lanes=1, dim=8)
    backend.add(random(1, 50_000, 8))
    new = random(1, 10, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        backend.remove_oldest(10)
        backend.add(new)
    assert max(event.cpu_memory_usage for event in profiled.events()) < 10_000


def test_growing_step_by_step_copies_each_vector_a_few_times_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = TorchBackend(lanes=1, dim=4)
    copied = 0
    reserve, unroll = backend.buffer._reserve, backend.buffer._unroll

    def counting_reserve(size: int) -> None:
        nonlocal copied
        before = backend.buffer.keys.data_ptr()
        reserve(size)
        moved = backend.buffer.keys.data_ptr() != before
        copied += moved * int(backend.buffer.counts.sum())

    def counting_unroll(lanes: torch.Tensor) -> None:
        nonlocal copied
        copied += int(backend.buffer.counts[lanes].sum())
        unroll(lanes)

    monkeypatch.setattr(backend.buffer, "_reserve", counting_reserve)
    monkeypatch.setattr(backend.buffer, "_unroll", counting_unroll)
    added = 0
    for _ in range(500):
        backend.add(random(1, 5, 4))
        backend.remove_oldest(2)
        added += 5
    assert copied < 4 * added


def test_bfloat16_queries_are_searched_in_float32() -> None:
    backend = TorchBackend(lanes=1, dim=64)
    keys = random(1, 2000, 64)
    backend.add(keys)
    queries = random(1, 20, 64, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = backend.search(queries, 8)
    expected = (queries.double() @ keys.double().transpose(1, 2)).topk(8)
    assert torch.equal(result.ids, expected.indices)
    torch.testing.assert_close(result.scores.double(), expected.values, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    keys, queries = random(3, 5000, 32), random(3, 70, 32, seed=1)
    results = []
    for device in ("cpu", "cuda"):
        backend = TorchBackend(lanes=3, dim=32, device=device)
        backend.add(keys.to(device))
        backend.remove_oldest(700)
        results.append(backend.search(queries.to(device), 16))
    torch.testing.assert_close(results[1].scores.cpu(), results[0].scores, rtol=1e-4, atol=1e-4)


def half(**options) -> TorchBackend:
    return TorchBackend(lanes=3, dim=32, storage="bfloat16", **options)


def test_half_width_takes_half_the_memory_and_says_that_it_is_not_exact() -> None:
    keys = random(3, 640, 32)
    whole, narrow = TorchBackend(lanes=3, dim=32), half()
    for backend in (whole, narrow):
        backend.add(keys)
    assert (whole.exact, narrow.exact) == (True, False)
    assert narrow.buffer.keys.nbytes * 2 == whole.buffer.keys.nbytes


def test_half_width_scores_are_float32_products_of_the_rounded_keys() -> None:
    keys, queries = random(3, 5000, 32), random(3, 70, 32, seed=1)
    backend = half()
    backend.add(keys)
    result = backend.search(queries, 16)
    rounded = keys.bfloat16().double()
    expected = queries.double() @ rounded.transpose(1, 2)
    torch.testing.assert_close(
        result.scores.double(), expected.gather(2, result.ids), rtol=1e-5, atol=1e-5
    )
    kth = expected.topk(16).values[..., -1:]
    assert (result.scores.double() >= kth - 1e-5).float().mean() > 0.99


def test_half_width_keys_that_overflow_are_refused() -> None:
    with pytest.raises(ShapeError, match="finite"):
        half().add(torch.full((3, 1, 32), 3.4e38))


def test_what_half_width_saved_any_width_loads(tmp_path) -> None:
    keys, queries = random(3, 300, 32), random(3, 7, 32, seed=1)
    narrow, whole = half(), TorchBackend(lanes=3, dim=32)
    narrow.add(keys)
    narrow.save(tmp_path)
    whole.load(tmp_path)
    torch.testing.assert_close(whole.search(queries, 5).scores, narrow.search(queries, 5).scores)
    narrow.take_over(whole.buffer)
    assert narrow.buffer.keys.dtype == torch.bfloat16


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(ConfigError, match="storage must be 'float32' or 'bfloat16', got 'int8'"):
        TorchBackend(lanes=1, dim=4, storage="int8")
