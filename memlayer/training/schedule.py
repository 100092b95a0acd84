"""The learning rate at each step, as a factor of its peak."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, *, steps: int, warmup: float) -> float:
    """Give the factor on the peak learning rate at one step: linear rise, then linear fall.

    The rise ends with factor 1 after ``ceil(warmup * steps)`` steps. The fall would reach 0 at
    step ``steps + 1``, so that every step changes the weights.

    Args:
        step: from 1 to ``steps``.
        steps: all steps of the run.
        warmup: part of them in which the rate rises, 0 to 1.

    Source:
        LongMem (arXiv:2306.07174), training: polynomial decay, of power 1.
    """
    rising = math.ceil(warmup * steps)
    if step <= rising:
        return step / rising
    return (steps + 1 - step) / (steps + 1 - max(rising, 1))
