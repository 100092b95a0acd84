"""Search in blocks of any shape against all products at once, in float64."""

import pytest
import torch
from torch import Tensor

from memlayer_backends.blocked_search import Block, BlockedSearch, block_memory, top_k
from memlayer_backends.key_buffer import GROUP, KeyBuffer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maxima_of(scores: Tensor) -> Tensor:
    return scores.unflatten(1, (-1, GROUP)).amax(-1)


@pytest.mark.parametrize("n", [64, 640, 6400])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_the_best_groups_hold_the_best_scores(n: int, k: int) -> None:
    scores = random(14, n)
    values, positions = top_k(scores, maxima_of(scores), k)
    expected = scores.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(positions, expected.indices)


def test_nothing_is_missed_where_the_best_scores_share_a_group() -> None:
    scores = random(1, 6400)
    scores[:, 640:648] += 100.0
    assert torch.equal(top_k(scores, maxima_of(scores), 8)[1], scores.topk(8).indices)


def test_rows_that_do_not_lie_next_to_each_other_are_told_apart() -> None:
    scores = random(5, 1280)[:, :1216]
    expected = scores.topk(4)
    values, positions = top_k(scores, maxima_of(scores), 4)
    assert torch.equal(values, expected.values)
    assert torch.equal(positions, expected.indices)


def test_equal_scores_and_padding_are_told_apart() -> None:
    scores = torch.full((2, 6400), -torch.inf)
    scores[:, 5000:5003] = 1.0
    values, positions = top_k(scores, maxima_of(scores), 4)
    assert values.tolist() == [[1.0, 1.0, 1.0, -torch.inf]] * 2
    assert positions[:, :3].sort().values.tolist() == [[5000, 5001, 5002]] * 2


BLOCKS = [
    Block(lanes=3, queries=20, slots=1024, step=1024),  # all at once
    Block(lanes=3, queries=7, slots=1024, step=1024),
    Block(lanes=2, queries=20, slots=1024, step=1024),  # the last block has one lane
    Block(lanes=1, queries=20, slots=1024, step=64),
    Block(lanes=1, queries=3, slots=448, step=192),  # the last of each is shorter
    Block(lanes=1, queries=1, slots=64, step=64),
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("k", [1, 9, 70])
def test_a_block_of_any_shape_finds_what_all_products_find(block: Block, k: int) -> None:
    lanes, q, dim = 3, 20, 8
    buffer = KeyBuffer(lanes=lanes, dim=dim, device=torch.device("cpu"))
    every = torch.arange(lanes)
    buffer.append(random(lanes, 1000, dim), every)
    buffer.drop_oldest(400, every)
    buffer.append(random(lanes, 300, dim, seed=1), every)  # wraps: free slots in the middle
    buffer.drop_oldest(50, torch.tensor([1]))
    occupancy = buffer.occupancy()
    # What a free slot holds must not matter.
    spoiled = occupancy.free
    buffer.keys[:, occupancy.free_start : occupancy.free_stop][spoiled] = torch.nan
    queries = random(lanes, q, dim, seed=2)
    search = BlockedSearch(
        keys=buffer.keys,
        occupancy=occupancy,
        block=block,
        memory=torch.full((block_memory(block),), torch.nan),
    )
    scores, slots = search.best(queries, k)
    for lane in range(lanes):
        live = buffer.live(torch.tensor([lane])).double()
        expected = (queries[lane].double() @ live.T).topk(k)
        found = occupancy.ids(slots)[lane] - buffer.first_ids[lane]
        torch.testing.assert_close(scores[lane], expected.values.float())
        assert torch.equal(found, expected.indices)
