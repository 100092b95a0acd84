"""Exact scores of candidates against float64 products of the same vectors."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memlayer_backends import rescoring
from memlayer_backends.key_buffer import KeyBuffer
from memlayer_backends.rescoring import best_of, exact_scores


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(*counts: int, dim: int = 8) -> tuple[KeyBuffer, list[dict[int, torch.Tensor]]]:
    """Give a buffer whose rings wrap, with NaN in free slots, and its vectors by id."""
    buffer = KeyBuffer(lanes=len(counts), dim=dim, device=torch.device("cpu"))
    held: list[dict[int, torch.Tensor]] = []
    for lane, count in enumerate(counts):
        keys = random(1, 2 * count, dim, seed=lane)
        buffer.append(keys[:, : count + 3], torch.tensor([lane]))
        buffer.drop_oldest(min(count, 7), torch.tensor([lane]))
        buffer.append(keys[:, count + 3 :], torch.tensor([lane]))
        extra = int(buffer.counts[lane]) - count
        buffer.drop_oldest(extra, torch.tensor([lane]))
        first = int(buffer.first_ids[lane])
        held.append({first + i: keys[0, first + i].double() for i in range(count)})
    free = buffer.occupancy()
    part = buffer.keys[:, free.free_start : free.free_stop]
    part[free.free] = math.nan
    return buffer, held


def check(
    held: list[dict[int, torch.Tensor]],
    queries: torch.Tensor,
    ids: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    expected = torch.full(ids.shape, -math.inf, dtype=torch.float64)
    for lane, query, place in torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist():
        vector = held[lane].get(int(ids[lane, query, place]))
        if vector is not None:
            expected[lane, query, place] = vector @ queries[lane, query].double()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_bytes", [4, 32 * 7, 32 * 100, 2**22])
def test_scores_are_the_products_with_the_vectors_of_these_ids(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescoring, "CPU_BLOCK_BYTES", block_bytes)
    buffer, held = filled(40, 9, 25)
    queries = random(3, 5, 8, seed=9)
    ids = torch.randint(-3, 80, (3, 5, 12), generator=torch.Generator().manual_seed(1))
    scores = exact_scores(buffer, queries, ids)
    assert torch.isinf(scores).any()
    assert torch.isfinite(scores).any()
    check(held, queries, ids, scores)


def test_the_best_of_all_ids_are_what_full_search_finds() -> None:
    buffer, held = filled(40, 40)
    queries = random(2, 6, 8, seed=9)
    ids = torch.stack([torch.tensor(list(lane)) for lane in held])[:, None].expand(-1, 6, -1)
    scores, found = best_of(buffer, queries, ids, 5)
    for lane, vectors in enumerate(held):
        products = queries[lane].double() @ torch.stack(list(vectors.values())).T
        best = products.topk(5)
        assert torch.equal(found[lane], torch.tensor(list(vectors))[best.indices])
        torch.testing.assert_close(scores[lane].double(), best.values, rtol=1e-5, atol=1e-5)


def test_dropped_and_unknown_ids_count_as_missing() -> None:
    buffer, held = filled(20)
    first = min(held[0])
    ids = torch.tensor([[[first - 1, -1, first + 4, first + 20, first + 1]]])
    scores, found = best_of(buffer, random(1, 1, 8, seed=9), ids, 4)
    assert sorted(found[0, 0, :2].tolist()) == [first + 1, first + 4]
    assert found[0, 0, 2:].tolist() == [-1, -1]
    assert scores[0, 0, 2:].tolist() == [-math.inf] * 2


def test_fewer_candidates_than_k_are_padded() -> None:
    buffer, held = filled(20)
    ids = torch.tensor([[[min(held[0]) + 2]]])
    scores, found = best_of(buffer, random(1, 1, 8, seed=9), ids, 3)
    assert found.tolist() == [[[min(held[0]) + 2, -1, -1]]]
    assert scores[0, 0, 1:].tolist() == [-math.inf] * 2


@pytest.mark.parametrize("shape", [(2, 3, 0), (2, 0, 4), (2, 3, 4)])
def test_an_empty_buffer_holds_no_candidate(shape: tuple[int, int, int]) -> None:
    buffer = KeyBuffer(lanes=2, dim=8, device=torch.device("cpu"))
    scores, found = best_of(buffer, random(2, shape[1], 8), torch.zeros(shape).long(), 2)
    assert tuple(scores.shape) == (2, shape[1], 2)
    assert (scores == -math.inf).all()
    assert (found == -1).all()


def test_candidates_of_all_queries_are_never_copied_at_once() -> None:
    buffer, _ = filled(2000, dim=64)
    ids = torch.randint(2000, (1, 1000, 100), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        exact_scores(buffer, random(1, 1000, 64), ids)
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert largest <= rescoring.CPU_BLOCK_BYTES < ids.numel() * 64 * 4
