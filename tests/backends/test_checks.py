"""What a caller's mistakes are told, which is the same for every built-in backend."""

import math

import pytest
import torch

from memlayer import ConfigError, RetrievalBackend, ShapeError
from memlayer_backends.torch_exact import TorchBackend


@pytest.fixture
def backend() -> RetrievalBackend:
    return TorchBackend(lanes=3, dim=4)


def test_nan_keys_are_refused_with_lane_and_position(backend: RetrievalBackend) -> None:
    keys = torch.zeros(2, 6, 4)
    keys[1, 5, 0] = math.nan
    with pytest.raises(ShapeError) as caught:
        backend.add(keys, [0, 2])
    assert str(caught.value) == (
        "keys must be finite in float32, got nan in lane 2 at position 5 of the keys given; "
        "nothing was stored"
    )


def test_float64_keys_beyond_float32_are_refused(backend: RetrievalBackend) -> None:
    with pytest.raises(ShapeError, match="got inf in lane 0 at position 0"):
        backend.add(torch.full((3, 1, 4), 1e300, dtype=torch.float64))


def test_a_wrong_shape_is_told_beside_the_right_one(backend: RetrievalBackend) -> None:
    with pytest.raises(ShapeError) as caught:
        backend.add(torch.zeros(2, 6, 4))
    assert str(caught.value) == (
        "keys must have shape (3, n, 4), that is (lanes, n, dim), got (2, 6, 4)"
    )


def test_a_wrong_device_is_told_with_the_way_out(backend: RetrievalBackend) -> None:
    with pytest.raises(ShapeError) as caught:
        backend.search(torch.zeros(3, 6, 4, device="meta"), 1)
    assert str(caught.value) == (
        "queries must be on cpu, got a tensor on meta; move it with .to('cpu')"
    )


def test_a_wrong_dtype_is_named(backend: RetrievalBackend) -> None:
    with pytest.raises(ShapeError, match=r"keys must have a float dtype, got torch\.int64"):
        backend.add(torch.zeros(3, 6, 4, dtype=torch.int64))


@pytest.mark.parametrize("lanes", [[0, 0], [3], [-1]])
def test_impossible_lanes_are_named(backend: RetrievalBackend, lanes: list[int]) -> None:
    with pytest.raises(ShapeError) as caught:
        backend.clear(lanes)
    assert str(caught.value) == f"lanes must be numbers from 0 to 2, each at most once, got {lanes}"


def test_lanes_that_are_no_numbers_are_refused(backend: RetrievalBackend) -> None:
    with pytest.raises(ShapeError, match="sequence of whole numbers, got 'all'"):
        backend.clear("all")  # type: ignore[arg-type]


def test_removing_too_many_names_the_lane_and_what_it_holds(backend: RetrievalBackend) -> None:
    backend.add(torch.zeros(3, 2, 4))
    backend.add(torch.zeros(1, 2, 4), [0])
    with pytest.raises(ShapeError) as caught:
        backend.remove_oldest(3)
    assert str(caught.value) == (
        "remove_oldest needs 3 vectors in every given lane, got 2 in lane 1; nothing was dropped"
    )


@pytest.mark.parametrize("n", [-1, 1.0, True])
def test_removing_a_number_that_is_none_is_refused(backend: RetrievalBackend, n: int) -> None:
    with pytest.raises(ShapeError, match=f"n must be a whole number, at least 0, got {n!r}"):
        backend.remove_oldest(n)


@pytest.mark.parametrize("k", [0, -1, 2.0])
def test_a_k_that_is_no_count_is_refused(backend: RetrievalBackend, k: int) -> None:
    with pytest.raises(ConfigError, match=f"k must be a whole number, at least 1, got {k!r}"):
        backend.search(torch.zeros(3, 1, 4), k)


@pytest.mark.parametrize("size", ["lanes", "dim"])
def test_a_size_below_one_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=f"{size} must be a whole number, at least 1, got 0"):
        TorchBackend(**{"lanes": 1, "dim": 1, size: 0})


def test_an_unknown_option_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        TorchBackend(lanes=1, dim=1, block_size=4)
    assert (
        str(caught.value)
        == "backend 'torch' has no option 'block_size'; known: block_megabytes, storage"
    )


def test_an_option_of_a_wrong_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_megabytes must be a whole number, at least 1"):
        TorchBackend(lanes=1, dim=1, block_megabytes=0)
