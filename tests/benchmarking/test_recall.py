import torch

from memlayer.benchmarking.recall import kth_scores, recall


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)


def test_exact_search_finds_all() -> None:
    keys, queries = pairs()
    best = (queries @ keys.transpose(1, 2)).topk(5)
    kth = kth_scores(keys, queries, 5)
    torch.testing.assert_close(kth, best.values[..., -1])
    assert recall(keys, queries, best.indices, kth) == 1


def test_what_is_missed_repeated_or_not_there_counts_as_missed() -> None:
    keys, queries = pairs()
    kth = kth_scores(keys, queries, 4)
    found = (queries @ keys.transpose(1, 2)).topk(4).indices
    worst = (queries @ keys.transpose(1, 2)).argmin(-1)
    for column, replacement in (
        (0, worst),
        (1, found[..., 0]),
        (2, torch.full_like(worst, -1)),
        (3, torch.full_like(worst, 50)),
    ):
        spoiled = found.clone()
        spoiled[..., column] = replacement
        assert recall(keys, queries, spoiled, kth) == 0.75


def test_of_equal_vectors_any_is_right() -> None:
    keys = torch.ones(1, 9, 4)
    queries = torch.ones(1, 2, 4)
    kth = kth_scores(keys, queries, 3)
    assert recall(keys, queries, torch.tensor([[[8, 1, 4], [0, 2, 7]]]), kth) == 1


def test_many_queries_are_scored_in_blocks(monkeypatch) -> None:
    keys, queries = pairs()
    whole = kth_scores(keys, queries, 3)
    monkeypatch.setattr("memlayer.benchmarking.recall.BLOCK", 100)
    torch.testing.assert_close(kth_scores(keys, queries, 3), whole)
