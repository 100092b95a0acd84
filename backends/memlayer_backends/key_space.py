"""The space in which an approximate index of a model's keys finds what its queries ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SMALLEST_SHARE = 1e-3
"""Added to the moment of every direction, as a share of the mean one."""

HEADROOM = 1.1
"""How much longer than those it was fitted to a key may be without being cut short."""


@dataclass(frozen=True)
class KeySpace:
    r"""A change of keys and queries that keeps the order of each query's products.

    Clusters and graphs bring together keys that are near each other. What counts is how far apart
    their products with the queries to come are, in the mean
    :math:`\mathbb{E}_q[(q \cdot (x - y))^2] = (x - y)^\top C (x - y)` with the queries' second
    moment :math:`C`. That is the plain distance after

    .. math::

        x' = C^{1/2} (x - \bar x), \qquad q' = C^{-1/2} q, \qquad q' \cdot x' = q x - q \bar x

    The mean, which keys of a real model share, is a constant for each query and goes. Keys are
    scaled into the unit ball, and queries to length 1: that too changes no order.

    Attributes:
        mean: ``(dim,)``, float64.
        for_keys: ``(dim, dim)``, float64. :math:`C^{1/2}`, scaled.
        for_queries: ``(dim, dim)``, float64. :math:`C^{-1/2}`.
    """

    mean: Tensor
    for_keys: Tensor
    for_queries: Tensor

    @classmethod
    def of(cls, keys: Tensor, moment: Tensor | None = None) -> Self:
        """Fit the space.

        Args:
            keys: ``(n, dim)``, n at least 1. All that are to lie in it, or a sample of them.
            moment: ``(dim, dim)``. :math:`C` up to a factor, as `QueryMoments` gives it; None: the
                identity, since nothing is known of the queries.
        """
        keys = keys.double()
        mean = keys.mean(0)
        dim = keys.shape[1]
        if moment is None:
            root = inverse = torch.eye(dim, dtype=torch.float64)
        else:
            variances, directions = torch.linalg.eigh(moment.double())
            scales = (variances.clamp(min=0) + SMALLEST_SHARE * variances.mean()).sqrt()
            root = (directions * scales) @ directions.T
            inverse = (directions / scales) @ directions.T
        longest = float(((keys - mean) @ root).norm(dim=1).max()) * HEADROOM
        return cls(mean=mean, for_keys=root / (longest or 1.0), for_queries=inverse)

    # In float64 and rounded once, since how a product is summed up depends on the number of
    # threads, and an index is to be the same whatever that is.

    def keys(self, keys: Tensor) -> Tensor:
        """Move keys ``(n, dim)`` into the space: float32, of length 1 at most but for outliers."""
        moved: Tensor = (keys.double() - self.mean) @ self.for_keys
        return moved.float()

    def queries(self, queries: Tensor) -> Tensor:
        """Move queries ``(q, dim)`` into the space: float32, of length 1."""
        moved: Tensor = queries.double() @ self.for_queries
        unit: Tensor = moved / moved.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return unit.float()

    def lifted_keys(self, keys: Tensor) -> Tensor:
        """Give keys one more number, that makes them all equally long: ``(n, dim + 1)``.

        Then the nearest key is the one with the largest product, so that graphs which need a
        distance serve inner products.
        """
        moved = self.keys(keys)
        rest = (1 - moved.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([moved, rest], dim=1)

    def lifted_queries(self, queries: Tensor) -> Tensor:
        """Give queries ``(q, dim + 1)`` for lifted keys: their products are those of `queries`."""
        return torch.nn.functional.pad(self.queries(queries), (0, 1))


class QueryMoments:
    """What each lane was asked: second moments of its queries, the older ones fading.

    Attributes:
        counts: ``(lanes,)``, int64. Queries that the moments are of.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
    """

    ENOUGH = 1024
    """Queries from which on a moment hardly changes any more."""

    PER_SEARCH = 32
    """Queries of one search that are looked at once there are enough."""

    def __init__(self, *, lanes: int, dim: int) -> None:
        self.counts = torch.zeros(lanes, dtype=torch.int64)
        self._sums = torch.zeros(lanes, dim, dim, dtype=torch.float64)

    def note(self, queries: Tensor) -> None:
        """Take queries ``(lanes, q, dim)`` of a search into account, or some of many."""
        wanted = self.ENOUGH if bool((self.counts < self.ENOUGH).any()) else self.PER_SEARCH
        some = queries[:, :: -(-queries.shape[1] // wanted)].double()
        # The direction of a query says what it asks for; its length, nothing.
        some = some / some.norm(dim=2, keepdim=True).clamp(min=1e-300)
        fading = self.counts >= 8 * self.ENOUGH
        self._sums[fading] /= 2
        self.counts[fading] //= 2
        self._sums += torch.bmm(some.transpose(1, 2), some)
        self.counts += some.shape[1]

    def of(self, lane: int) -> Tensor:
        """Give a lane's moment ``(dim, dim)``, float64, near the identity while few are known."""
        dim = self._sums.shape[1]
        few = torch.eye(dim, dtype=torch.float64) * self.ENOUGH / (64 * dim)
        return (self._sums[lane] + few) / (self.counts[lane] + self.ENOUGH / 64)
