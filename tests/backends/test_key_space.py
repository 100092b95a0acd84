import pytest
import torch

from memlayer_backends.key_space import KeySpace, QueryMoments


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(queries: torch.Tensor) -> torch.Tensor:
    moments = QueryMoments(lanes=1, dim=queries.shape[1])
    moments.note(queries[None])
    return moments.of(0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_each_query_orders_keys_as_before(scale: float) -> None:
    keys = scale * (random(300, 16) * torch.arange(1, 17) + 7)
    queries = random(20, 16, seed=1)
    products = queries.double() @ keys.double().T
    for moment in (None, moment_of(random(500, 16, seed=2) * torch.arange(16, 0, -1))):
        space = KeySpace.of(keys, moment)
        moved = space.queries(queries).double() @ space.keys(keys).double().T
        lifted = space.lifted_queries(queries).double() @ space.lifted_keys(keys).double().T
        # Moved products are the others times a factor plus a constant, both of the query.
        for changed in (moved, lifted):
            by_rank = changed.gather(1, products.argsort(1))
            assert (by_rank.diff(dim=1) > -1e-6).all()


def test_distances_are_how_far_products_differ_in_the_mean() -> None:
    queries = random(4000, 8, seed=1) * torch.arange(1, 9)
    queries = queries / queries.norm(dim=1, keepdim=True)
    keys = random(50, 8)
    space = KeySpace.of(keys, queries.double().T @ queries.double() / len(queries))
    moved = space.keys(keys).double()
    distances = torch.cdist(moved, moved).square()
    products = queries.double() @ keys.double().T  # (q, n)
    differences = (products[:, :, None] - products[:, None, :]).square().mean(0)
    ratio = distances[differences > 0] / differences[differences > 0]
    assert ratio.max() / ratio.min() < 1.05


def test_lifted_keys_are_equally_long_and_keys_lie_in_the_unit_ball() -> None:
    keys = random(200, 16) + 3
    space = KeySpace.of(keys, moment_of(random(2000, 16, seed=1)))
    torch.testing.assert_close(space.lifted_keys(keys).norm(dim=1), torch.ones(200))
    assert space.keys(keys).norm(dim=1).max() <= 1


def test_keys_that_are_all_alike_and_queries_of_zeros_give_finite_vectors() -> None:
    keys = torch.full((5, 4), 2.5)
    space = KeySpace.of(keys, moment_of(torch.zeros(3, 4)))
    assert torch.isfinite(space.lifted_keys(keys)).all()
    assert torch.isfinite(space.lifted_queries(torch.zeros(2, 4))).all()


def test_a_moment_of_few_queries_is_near_the_identity() -> None:
    queries = random(1, 8)
    moment = 8 * moment_of(queries)
    assert torch.allclose(moment, torch.eye(8, dtype=torch.float64), atol=0.6)
    none = QueryMoments(lanes=2, dim=8).of(1)
    assert torch.allclose(8 * none, torch.eye(8, dtype=torch.float64))


def test_old_queries_fade() -> None:
    moments = QueryMoments(lanes=1, dim=2)
    for _ in range(20):
        moments.note(torch.tensor([1.0, 0.0]).expand(1, 1024, 2))
    for _ in range(2000):
        moments.note(torch.tensor([0.0, 1.0]).expand(1, 32, 2))
    moment = moments.of(0)
    assert moment[1, 1] > 0.9
    assert moments.counts[0] <= 8 * QueryMoments.ENOUGH + 32
