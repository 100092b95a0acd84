"""Time several sides in turn, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LEAST_SECONDS = 0.005
"""A round repeats a quicker call until it has taken as long: the clock has steps."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call, over several rounds.

    Attributes:
        median: of the rounds.
        low: of the quickest round.
        high: of the slowest round.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise rounds, of which there is one at least."""
        return cls(median=statistics.median(seconds), low=min(seconds), high=max(seconds))


def interleave(
    sides: Sequence[Callable[[], object]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    least_seconds: float = LEAST_SECONDS,
) -> list[list[float]]:
    """Time every side once a round, one after the other.

    Args:
        sides: what is timed. Each is called once before, which does not count.
        rounds: at least 1.
        device: that is waited for before the clock is read.
        least_seconds: how long a round of one side takes at least.

    Returns:
        For each side the seconds of one call, in each round.
    """
    calls = []
    for side in sides:
        once = timed(side, device)
        calls.append(max(1, round(least_seconds / max(once, 1e-9))))
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, number, kept in zip(sides, calls, seconds, strict=True):
            kept.append(timed(side, device, calls=number))
    return seconds


def timed(call: Callable[[], object], device: torch.device | str, *, calls: int = 1) -> float:
    """Give the seconds of one of several calls."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: torch.device | str) -> None:
    """Wait until a device has done what it was given."""
    device = torch.device(device)
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
