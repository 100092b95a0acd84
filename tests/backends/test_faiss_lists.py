"""``faiss`` with inverted lists: when they are trained, what they forget, what they find."""

from typing import Any

import pytest
import torch

from memlayer import ConfigError
from memlayer.retrieval import SearchResult
from memlayer_backends._faiss_lists import LaneLists, default_n_lists, default_n_probe
from memlayer_backends.faiss_cpu import FaissBackend
from memlayer_backends.key_space import QueryMoments
from memlayer_backends.torch_exact import TorchBackend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def faiss_or_skip() -> None:
    pytest.importorskip("faiss")


def make(lanes: int = 1, dim: int = 8, **options: Any) -> FaissBackend:
    return FaissBackend(lanes=lanes, dim=dim, index="ivf", **{"exact_below": 64, **options})


def ask(backend: FaissBackend, n: int = 1) -> None:
    """Search, which is when lists follow what was written."""
    backend.search(random(backend.lanes, n, backend.dim, seed=77), 1)


def lists_of(backend: FaissBackend, lane: int = 0) -> LaneLists | None:
    ask(backend)
    return backend._lists[lane]


def test_only_flat_is_exact() -> None:
    assert FaissBackend(lanes=1, dim=4).exact
    assert not make().exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": "pq"}, "index must be 'flat' or 'ivf', got 'pq'"),
        ({"nprobe": 4}, "nprobe is for index='ivf', got nprobe=4 with index='flat'"),
        ({"index": "flat", "nlist": 4}, "nlist is for index='ivf', got nlist=4 with index='flat'"),
        ({"index": "ivf", "nlist": 0}, "nlist must be a whole number, at least 1, got 0"),
        ({"index": "ivf", "exact_below": 1.5}, "exact_below must be a whole number"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FaissBackend(lanes=1, dim=4, **options)
    assert message in str(caught.value)


def test_a_small_lane_is_searched_exactly_and_beside_one_with_lists() -> None:
    approximate, exact = make(lanes=2, nlist=8, nprobe=1), TorchBackend(lanes=2, dim=8)
    for backend in (approximate, exact):
        backend.add(random(1, 63, 8), [0])
        backend.add(random(1, 500, 8), [1])
    queries = random(2, 20, 8, seed=1)
    found, best = approximate.search(queries, 10), exact.search(queries, 10)
    assert [lists is None for lists in approximate._lists] == [True, False]
    assert torch.equal(found.ids[0], best.ids[0])
    assert not torch.equal(found.ids[1], best.ids[1])


def test_lists_go_well_below_where_they_come() -> None:
    backend = make()
    backend.add(random(1, 64, 8))
    assert lists_of(backend) is not None
    backend.remove_oldest(32)
    assert lists_of(backend) is not None
    backend.remove_oldest(1)
    assert lists_of(backend) is None


def test_all_lists_read_is_exact_search() -> None:
    backend, exact = make(nlist=8, nprobe=8), TorchBackend(lanes=1, dim=8)
    for each in (backend, exact):
        each.add(random(1, 1000, 8))
        each.remove_oldest(123)
    queries = random(1, 100, 8, seed=1)
    found, best = backend.search(queries, 16), exact.search(queries, 16)
    # Half-width candidates: only the last of 16 may be another one, as good to three digits.
    assert torch.equal(found.ids[..., :12], best.ids[..., :12])
    torch.testing.assert_close(found.scores, best.scores, rtol=1e-2, atol=1e-3)


def test_queries_whose_lists_are_short_find_k_nevertheless() -> None:
    backend, exact = make(nlist=64, nprobe=1), TorchBackend(lanes=1, dim=8)
    for each in (backend, exact):
        each.add(random(1, 128, 8))
    queries = random(1, 10, 8, seed=1)
    found = backend.search(queries, 100)
    assert (found.ids >= 0).all()
    assert torch.equal(found.ids, exact.search(queries, 100).ids)


def test_removed_vectors_are_never_found_and_lists_hold_few_of_them() -> None:
    backend = make(nprobe=1000)
    backend.add(random(1, 400, 8))
    for step in range(60):
        backend.remove_oldest(7)
        ids = backend.search(random(1, 30, 8, seed=step), 20).ids
        assert int(ids.min()) >= int(backend.buffer.first_ids[0])
        backend.add(random(1, 7, 8, seed=step))
        lists = lists_of(backend)
        assert lists is not None
        assert len(lists) <= 1.25 * 400 + 7


def test_lists_are_trained_again_when_the_lane_has_grown_fourfold() -> None:
    backend = make()
    backend.add(random(1, 100, 8))
    trained_on = []
    for step in range(20):
        lists = lists_of(backend)
        assert lists is not None
        trained_on.append(lists.trained_on)
        backend.add(random(1, 100, 8, seed=step))
    assert trained_on == [100] * 3 + [400] * 12 + [1600] * 5


def test_lists_are_trained_again_when_none_of_their_vectors_is_left() -> None:
    backend = make()
    backend.add(random(1, 200, 8))
    first = lists_of(backend)
    for _ in range(9):
        backend.add(random(1, 20, 8))
        backend.remove_oldest(20)
        assert lists_of(backend) is first
    backend.add(random(1, 20, 8))
    backend.remove_oldest(20)
    assert lists_of(backend) is not first


def test_lists_are_trained_again_once_enough_queries_are_known() -> None:
    backend = make()
    backend.add(random(1, 200, 8))
    first = lists_of(backend)
    ask(backend, 500)
    assert backend._lists[0] is first
    ask(backend, 600)
    second = backend._lists[0]
    assert second is not first
    ask(backend, 5000)
    assert backend._lists[0] is second


def test_each_key_finds_itself_after_many_turns_of_the_ring() -> None:
    backend = make(lanes=2, dim=16)
    stored = torch.nn.functional.normalize(random(2, 4000, 16), dim=-1)
    backend.add(stored[:, :500])
    for start in range(500, 4000, 50):
        backend.remove_oldest(50)
        backend.add(stored[:, start : start + 50])
        ask(backend)
    found = backend.search(stored[:, 3500:], 1).ids[..., 0]
    assert (found == torch.arange(3500, 4000)).float().mean() > 0.99


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_number_of_threads_changes_nothing(lanes: int) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 4):
        torch.set_num_threads(threads)
        backend = make(lanes=lanes, nprobe=2)
        for step in range(10):
            backend.add(random(lanes, 100, 8, seed=step))
            backend.remove_oldest(30)
            ask(backend, 10)
        results.append(backend.search(random(lanes, 40, 8, seed=99), 5))
    torch.set_num_threads(before)
    assert torch.equal(results[0].ids, results[1].ids)


def test_lists_in_the_metric_of_the_queries_find_more() -> None:
    # As a language model's vectors are: keys share a large mean and vary in few directions, and
    # queries ask for others.
    n, dim = 8192, 64
    scales = torch.logspace(0, -2, dim)
    kinds = torch.randint(256, (n,), generator=torch.Generator().manual_seed(3))
    stored = random(256, dim, seed=4)[kinds] + 0.5 * random(n, dim)
    stored = (stored * scales + 20 * random(1, dim, seed=1))[None]
    queries = random(1, 2048, dim, seed=2) * scales.flip(0)
    backend, exact = make(1, dim, exact_below=4096), TorchBackend(lanes=1, dim=dim)
    for each in (backend, exact):
        each.add(stored)
    best = exact.search(queries[:, 1024:], 16)
    # Of keys alone, and asked nothing yet.
    backend._lists[0] = LaneLists(
        stored[0], 0, n_lists=256, moments=QueryMoments(lanes=1, dim=dim), lane=0
    )
    plain = backend.search(queries[:, 1024 : 1024 + 512], 16)
    backend.search(queries[:, :1024], 16)
    found = backend.search(queries[:, 1024:], 16)
    assert found.recall(best) >= 0.97
    assert plain.recall(SearchResult(best.scores[:, :512], best.ids[:, :512])) < 0.93


def test_defaults_grow_with_the_lane() -> None:
    assert [default_n_lists(count) for count in (1, 9, 4096, 262_144)] == [1, 9, 256, 2048]
    assert [default_n_probe(n_lists) for n_lists in (256, 1024, 2048)] == [34, 66, 109]


def test_what_is_saved_holds_no_lists_and_is_read_by_any_backend(tmp_path: Any) -> None:
    backend, exact = make(nprobe=1000), TorchBackend(lanes=1, dim=8)
    backend.add(random(1, 300, 8))
    ask(backend)
    backend.save(tmp_path)
    exact.load(tmp_path)
    again = make(nprobe=1000)
    again.add(random(1, 90, 8, seed=5))
    ask(again)
    again.load(tmp_path)
    queries = random(1, 50, 8, seed=1)
    assert torch.equal(again.search(queries, 5).ids, exact.search(queries, 5).ids)
