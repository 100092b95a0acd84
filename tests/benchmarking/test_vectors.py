import pytest
import torch
from safetensors.torch import save_file

from memlayer import DataError
from memlayer.benchmarking import read_pairs, synthetic_pairs


@pytest.fixture
def drawn():
    return synthetic_pairs(lanes=2, keys=3000, queries=500, dim=64, seed=0)


def test_drawn_vectors_are_the_same_for_the_same_seed(drawn) -> None:
    again = synthetic_pairs(lanes=2, keys=3000, queries=500, dim=64, seed=0)
    assert torch.equal(drawn.keys, again.keys)
    assert torch.equal(drawn.queries, again.queries)
    other = synthetic_pairs(lanes=2, keys=3000, queries=500, dim=64, seed=1)
    assert not torch.equal(drawn.keys, other.keys)


def test_drawn_queries_lie_elsewhere_than_keys(drawn) -> None:
    centre, asked = drawn.keys.mean(1), drawn.queries.mean(1)
    torch.testing.assert_close(centre.norm(dim=-1), torch.full((2,), 15.0), atol=0.5, rtol=0)
    torch.testing.assert_close(asked.norm(dim=-1), torch.full((2,), 14.0), atol=0.5, rtol=0)
    cosine = torch.cosine_similarity(centre, asked)
    # Random directions in 64 dimensions: 4 standard deviations of 1/8.
    assert cosine.abs().max() < 0.5
    assert not torch.equal(drawn.keys[0], drawn.keys[1])


def test_drawn_keys_have_favourites_as_real_ones_have(drawn) -> None:
    best = (drawn.queries @ drawn.keys.transpose(1, 2)).topk(16).indices
    for lane in best:
        often = torch.bincount(lane.flatten(), minlength=3000).sort(descending=True).values
        # On SmolLM2's 36 to 57 %; of vectors drawn alike and about 0 it would be about 5 %.
        assert often[:30].sum() > 0.3 * often.sum()


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "pairs.safetensors"
    tensors = {
        "keys": torch.randn(4, 100, 8, generator=generator).half(),
        "queries": torch.randn(4, 30, 8, generator=generator).half(),
    }
    save_file(tensors, path)
    return path, tensors


def test_pairs_are_read_as_far_as_they_are_wanted(file) -> None:
    path, tensors = file
    pairs = read_pairs(path, sizes=(16, 64, 256), lanes=3)
    assert torch.equal(pairs.keys, tensors["keys"][:3, :64].float())
    assert torch.equal(pairs.queries, tensors["queries"][:3].float())
    assert pairs.source == "real, of pairs.safetensors"
    assert read_pairs(path, sizes=(100,), lanes=None).keys.shape == (4, 100, 8)


def test_more_lanes_than_there_are_is_refused(file) -> None:
    with pytest.raises(DataError, match="has 4 lanes, got rows x heads = 5"):
        read_pairs(file[0], sizes=(16,), lanes=5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"keys": torch.zeros(2, 9, 4)}, "holds no keys and queries"),
        ({"keys": torch.zeros(2, 9, 4), "queries": torch.zeros(2, 9, 5)}, "must have keys"),
        ({"keys": torch.zeros(2, 9), "queries": torch.zeros(2, 9)}, "must have keys"),
        (
            {"keys": torch.full((2, 9, 4), torch.nan), "queries": torch.zeros(2, 9, 4)},
            "keys of .* must be finite",
        ),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, tensors, message) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "x.safetensors", sizes=(4,), lanes=None)


def test_what_is_no_file_of_tensors_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_pairs(tmp_path / "x.safetensors", sizes=(4,), lanes=None)
    (tmp_path / "x.safetensors").write_text("keys")
    with pytest.raises(DataError, match="holds no keys and queries"):
        read_pairs(tmp_path / "x.safetensors", sizes=(4,), lanes=None)
