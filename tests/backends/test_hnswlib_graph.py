import sys

import pytest
import torch

from memlayer import BackendUnavailableError, ConfigError
from memlayer_backends._graph_lane import Graph, default_ef_search
from memlayer_backends.hnswlib_graph import HnswlibBackend
from memlayer_backends.torch_exact import TorchBackend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def hnswlib_or_skip() -> None:
    pytest.importorskip("hnswlib")


def graph_of(backend: HnswlibBackend, lane: int = 0) -> Graph:
    ask(backend)
    graph = backend._graphs[lane].current
    assert graph is not None
    return graph


def ask(backend: HnswlibBackend) -> None:
    """Search, which is when graphs follow what was written."""
    backend.search(random(backend.lanes, 1, backend.dim, seed=77), 1)


def has_graph(backend: HnswlibBackend) -> list[bool]:
    ask(backend)
    return [lane.current is not None for lane in backend._graphs]


@pytest.fixture
def insertions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give a list that every insertion into a graph adds its number of vectors to."""
    inserted: list[int] = []
    add = Graph.add

    def counted(self: Graph, keys: torch.Tensor, first_id: int) -> None:
        inserted.append(len(keys))
        add(self, keys, first_id)

    monkeypatch.setattr(Graph, "add", counted)
    return inserted


def test_a_small_lane_is_searched_exactly() -> None:
    approximate, exact = HnswlibBackend(lanes=1, dim=32), TorchBackend(lanes=1, dim=32)
    for backend in (approximate, exact):
        backend.add(random(1, 1500, 32))
    queries = random(1, 50, 32, seed=1)
    assert has_graph(approximate) == [False]
    assert torch.equal(approximate.search(queries, 20).ids, exact.search(queries, 20).ids)


def test_a_lane_gets_its_graph_when_it_is_long_enough_and_loses_it_well_below() -> None:
    backend = HnswlibBackend(lanes=2, dim=4, exact_below=100)
    for seed in range(10):
        backend.add(random(1, 20, 4, seed=seed), [0])
        assert has_graph(backend) == [seed == 9, False]
    backend.add(random(1, 99, 4), [1])
    assert has_graph(backend) == [True, False]
    backend.remove_oldest(150, [0])
    assert has_graph(backend) == [True, False]
    backend.remove_oldest(1, [0])
    assert has_graph(backend) == [False, False]


def test_no_write_inserts_many_more_vectors_than_it_adds_or_drops(insertions: list[int]) -> None:
    backend = HnswlibBackend(lanes=1, dim=4, exact_below=64)
    for step in range(30):
        del insertions[:]
        backend.add(random(1, 10, 4, seed=step))
        ask(backend)
        assert sum(insertions) <= 2 * 10
    assert has_graph(backend) == [True]
    for step in range(100):
        del insertions[:]
        dropped, added = (7, 7) if step < 60 else (7, 3)
        backend.remove_oldest(dropped)
        backend.add(random(1, added, 4, seed=step))
        ask(backend)
        assert sum(insertions) <= 2 * added + dropped
        count = int(backend.counts()[0])
        graph = graph_of(backend)
        assert graph.removed <= count + dropped
        assert len(graph) <= 2 * 300 + added


def test_each_key_finds_itself_after_many_turns_of_the_ring() -> None:
    backend = HnswlibBackend(lanes=2, dim=16, exact_below=64)
    stored = torch.nn.functional.normalize(random(2, 4000, 16), dim=-1)
    backend.add(stored[:, :500])
    for start in range(500, 4000, 50):
        backend.remove_oldest(50)
        backend.add(stored[:, start : start + 50])
    found = backend.search(stored[:, 3500:], 1).ids[..., 0]
    right = (found == torch.arange(3500, 4000)).float().mean()
    assert has_graph(backend) == [True, True]
    assert right > 0.99


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_number_of_threads_changes_nothing(lanes: int) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        backend = HnswlibBackend(lanes=lanes, dim=8, exact_below=64, ef_search=4, m=4)
        for step in range(10):
            backend.add(random(lanes, 100, 8, seed=step))
            backend.remove_oldest(30)
        results.append(backend.search(random(lanes, 40, 8, seed=99), 5))
    torch.set_num_threads(before)
    assert torch.equal(results[0].ids, results[1].ids)


def test_keys_that_share_most_of_their_length_are_found() -> None:
    # As a real model's do: their common part, which no query asks for, is most of every product.
    common = 8 * torch.nn.functional.normalize(random(1, 1, 32, seed=5), dim=-1)
    keys, queries = random(1, 5000, 32) + common, random(1, 50, 32, seed=1)
    queries = queries - 0.5 * common
    exact, approximate = TorchBackend(lanes=1, dim=32), HnswlibBackend(lanes=1, dim=32)
    for backend in (exact, approximate):
        backend.add(keys)
    assert approximate.search(queries, 16).recall(exact.search(queries, 16)) > 0.9


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
    assert graph_of(approximate).search(queries[0], 600, threads=1) is None
    result = approximate.search(queries, 600)
    torch.testing.assert_close(result.scores, exact.search(queries, 600).scores)


def test_the_same_vectors_make_the_same_graph() -> None:
    results = []
    for _ in range(2):
        backend = HnswlibBackend(lanes=1, dim=16, m=4, ef_search=4)
        backend.add(random(1, 5000, 16))
        results.append(backend.search(random(1, 40, 16, seed=1), 10))
    assert torch.equal(results[0].ids, results[1].ids)


def test_more_candidates_find_more() -> None:
    exact = TorchBackend(lanes=1, dim=32)
    exact.add(random(1, 5000, 32))
    queries = random(1, 40, 32, seed=1)
    kth = exact.search(queries, 10).scores[..., -1:] - 1e-4
    recalls = []
    for ef_search in (10, 500):
        backend = HnswlibBackend(lanes=1, dim=32, m=8, ef_search=ef_search)
        backend.add(random(1, 5000, 32))
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


def test_more_vectors_have_more_candidates_looked_at() -> None:
    counts = (1000, 16_384, 262_144)
    assert [default_ef_search(count) for count in counts] == [128, 204, 819]
