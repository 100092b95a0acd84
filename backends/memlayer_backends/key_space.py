"""A space in which a graph of keys serves queries that lie elsewhere than keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_VARIANCE = 1e-3
"""Added to every direction's variance, as a share of the mean one."""


@dataclass(frozen=True)
class KeySpace:
    r"""A linear change of keys and queries that keeps the order of each query's products.

    A graph over inner products links each key to those with which its product is large. Keys of a
    real model share most of their length, a mean that every product of two keys is about and that
    no query cares for; what varies does so mostly in a few directions. So keys lose their mean,
    and their covariance :math:`C` its square root:

    .. math::

        x' = C^{-1/4} (x - \bar x), \qquad q' = C^{1/4} q, \qquad q' x' = q x - q \bar x

    Attributes:
        mean: ``(dim,)``, float64.
        narrowing: ``(dim, dim)``, float64, symmetric. :math:`C^{-1/4}`, for keys.
        widening: ``(dim, dim)``, float64, symmetric. :math:`C^{1/4}`, for queries.
    """

    mean: Tensor
    narrowing: Tensor
    widening: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> KeySpace:
        """Fit the space to keys ``(n, dim)``, n at least 1."""
        keys = keys.double()
        mean = keys.mean(0)
        centred = keys - mean
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(keys))
        # Keys that are all alike have no variance: any scale will do.
        average = variances.mean().clamp(min=torch.finfo(torch.float32).tiny)
        scales = (variances.clamp(min=0) + SMALLEST_VARIANCE * average) ** 0.25
        return cls(
            mean=mean,
            narrowing=(directions / scales) @ directions.T,
            widening=(directions * scales) @ directions.T,
        )

    # In float64 and rounded once, since how a product is summed up depends on the number of
    # threads, and a graph is to be the same whatever that is.

    def keys(self, keys: Tensor) -> Tensor:
        """Move keys ``(n, dim)`` into the space, float32."""
        return ((keys.double() - self.mean) @ self.narrowing).float()

    def queries(self, queries: Tensor) -> Tensor:
        """Move queries ``(q, dim)`` into the space, float32."""
        return (queries.double() @ self.widening).float()
