import sys

import pytest
import torch

from memlayer import BackendUnavailableError, ConfigError
from memlayer_backends.hnswlib_graph import HnswlibBackend, _Graph
from memlayer_backends.torch_exact import TorchBackend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def hnswlib_or_skip() -> None:
    pytest.importorskip("hnswlib")


def graph_of(backend: HnswlibBackend) -> _Graph:
    graph = backend._graphs[0]
    assert graph is not None
    return graph


def test_a_small_lane_is_searched_exactly() -> None:
    approximate, exact = HnswlibBackend(lanes=1, dim=32), TorchBackend(lanes=1, dim=32)
    for backend in (approximate, exact):
        backend.add(random(1, 500, 32))
    queries = random(1, 50, 32, seed=1)
    assert approximate._graphs == [None]
    assert torch.equal(approximate.search(queries, 20).ids, exact.search(queries, 20).ids)


def test_a_lane_gets_its_graph_when_it_is_long_enough_and_loses_it_well_below() -> None:
    backend = HnswlibBackend(lanes=2, dim=4, exact_below=100)
    backend.add(random(1, 100, 4), [0])
    backend.add(random(1, 99, 4), [1])
    assert [graph is not None for graph in backend._graphs] == [True, False]
    backend.remove_oldest(50, [0])
    assert backend._graphs[0] is not None
    backend.remove_oldest(1, [0])
    assert backend._graphs[0] is None


def test_what_was_removed_never_fills_more_than_half_of_a_graph() -> None:
    backend = HnswlibBackend(lanes=1, dim=4, exact_below=64)
    backend.add(random(1, 200, 4))
    for step in range(60):
        backend.remove_oldest(30)
        backend.add(random(1, 30, 4, seed=step))
        graph = graph_of(backend)
        assert graph.removed <= 200
        assert graph._index.get_current_count() <= 2 * 200 + 30
        assert graph._capacity <= 1024


def test_as_many_as_a_lane_holds_are_found_also_after_most_were_removed() -> None:
    backend = HnswlibBackend(lanes=1, dim=8, exact_below=16, ef_search=1)
    backend.add(random(1, 400, 8))
    backend.remove_oldest(190)
    result = backend.search(random(1, 5, 8, seed=1), 300)
    for ids in result.ids[0]:
        assert sorted(ids[:210].tolist()) == list(range(190, 400))
        assert (ids[210:] == -1).all()


def test_a_graph_that_does_not_reach_k_vectors_is_replaced_by_an_exact_search() -> None:
    # With two links a vector, many copies of one vector cut the others off.
    options = {"exact_below": 2, "m": 2, "ef_construction": 2, "ef_search": 1}
    keys = torch.cat((torch.ones(1, 300, 8), random(1, 300, 8)), 1)
    approximate = HnswlibBackend(lanes=1, dim=8, **options)
    exact = TorchBackend(lanes=1, dim=8)
    approximate.add(keys)
    exact.add(keys)
    queries = random(1, 3, 8, seed=1)
    assert graph_of(approximate).search(queries[0], 600) is None
    result = approximate.search(queries, 600)
    torch.testing.assert_close(result.scores, exact.search(queries, 600).scores)


def test_the_same_vectors_make_the_same_graph() -> None:
    results = []
    for _ in range(2):
        backend = HnswlibBackend(lanes=1, dim=16, m=4, ef_search=4)
        backend.add(random(1, 3000, 16))
        results.append(backend.search(random(1, 40, 16, seed=1), 10))
    assert torch.equal(results[0].ids, results[1].ids)


def test_more_candidates_find_more() -> None:
    exact = TorchBackend(lanes=1, dim=32)
    exact.add(random(1, 3000, 32))
    queries = random(1, 40, 32, seed=1)
    kth = exact.search(queries, 10).scores[..., -1:] - 1e-4
    recalls = []
    for ef_search in (10, 500):
        backend = HnswlibBackend(lanes=1, dim=32, m=8, ef_search=ef_search)
        backend.add(random(1, 3000, 32))
        recalls.append((backend.search(queries, 10).scores >= kth).float().mean().item())
    assert recalls[0] < recalls[1]
    assert recalls[1] > 0.95


def test_a_missing_hnswlib_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    with pytest.raises(BackendUnavailableError) as caught:
        HnswlibBackend(lanes=1, dim=1)
    assert str(caught.value).startswith(
        'hnswlib is not installed: pip install "memlayer-lm[hnswlib]"'
    )


@pytest.mark.parametrize(
    ("option", "minimum"), [("m", 2), ("ef_construction", 1), ("ef_search", 1), ("exact_below", 1)]
)
def test_an_option_below_its_minimum_is_refused(option: str, minimum: int) -> None:
    message = f"{option} must be a whole number, at least {minimum}, got {minimum - 1}"
    with pytest.raises(ConfigError, match=message):
        HnswlibBackend(lanes=1, dim=1, **{option: minimum - 1})
