"""Vectors to test with, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def random_vectors(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Draw float32 vectors from the normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_vectors(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Draw float32 vectors of length 1: each is its own nearest under the inner product."""
    return torch.nn.functional.normalize(random_vectors(shape, seed=seed), dim=-1)


def clustered_vectors(
    *, lanes: int, n: int, dim: int, seed: int, noise_seed: int = 0, spread: float = 0.5
) -> Tensor:
    """Draw ``(lanes, n, dim)`` around 20 centres a lane, which keys of a real model are more like.

    Args:
        lanes: independent sets of centres.
        n: vectors a lane.
        dim: length of every vector.
        seed: decides the centres.
        noise_seed: decides where each vector lies around its centre.
        spread: distance from the centre, in standard deviations of the centres.
    """
    centres = random_vectors((lanes, 20, dim), seed=seed)
    which = torch.arange(n) % 20
    return centres[:, which] + spread * random_vectors((lanes, n, dim), seed=noise_seed + 1)
