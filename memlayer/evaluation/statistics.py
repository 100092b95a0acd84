r"""Intervals for the difference of two perplexities that were measured on the same tokens.

The quantity is the pooled difference of mean losses, :math:`\sum_u d_u / \sum_u n_u` in nats a
token: over units u, each with the sum d of its loss differences and its n tokens. What a unit is
decides what the interval speaks of:

- ``documents``: other documents of the same kind, by bootstrap over documents. Too narrow with few
  of them: about 80 % coverage instead of 95 % with four.
- ``documents-t``: the same, by Student's t on the ratio's residuals, which holds with few documents
  as far as their differences are near to normal.
- ``blocks``: other passages of these same documents, by bootstrap over contiguous blocks. It knows
  nothing of how documents differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LEVEL = 0.95
MIN_UNITS = {"documents": 4, "documents-t": 2, "blocks": 8}

Method = Literal["documents", "documents-t", "blocks"]

# Units drawn at a time: 4 M int64 are 32 MB.
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How much lower (negative) or higher one condition's mean loss is than another's.

    Attributes:
        condition: the condition measured.
        against: the condition that it is compared with.
        method: what the interval is over; the module's text tells them apart.
        units: documents or blocks that it rests on.
        difference: pooled difference of mean losses, nats per token; the logarithm of the ratio of
            the two perplexities.
        low: lower end of the 95 % interval; None where the units are too few for the method.
        high: upper end; None together with ``low``.
    """

    condition: str
    against: str
    method: Method
    units: int
    difference: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether an interval exists and lies on one side of 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def paired_interval(
    sums: Tensor,
    tokens: Tensor,
    *,
    method: Method,
    condition: str,
    against: str,
    resamples: int,
    seed: int,
) -> Interval:
    """Estimate the pooled difference of two conditions and its 95 % interval.

    Args:
        sums: ``(units,)``, float64. Loss of the condition less that of the other, summed per unit.
        tokens: ``(units,)``, float64. Scored tokens of each unit.
        method: what a unit is, and how the interval is made.
        condition: name of the condition measured.
        against: name of the other one.
        resamples: of a bootstrap.
        seed: of a bootstrap.
    """
    units = len(sums)
    low = high = None
    if units >= MIN_UNITS[method]:
        if method == "documents-t":
            low, high = student_interval(sums, tokens)
        else:
            low, high = bootstrap_interval(sums, tokens, resamples=resamples, seed=seed)
    return Interval(
        condition=condition,
        against=against,
        method=method,
        units=units,
        difference=float(sums.sum() / tokens.sum()),
        low=low,
        high=high,
    )


def bootstrap_interval(
    sums: Tensor, tokens: Tensor, *, resamples: int, seed: int
) -> tuple[float, float]:
    """Give the percentile interval of a pooled mean under resampling of its units.

    Args:
        sums: ``(units,)``, float64.
        tokens: ``(units,)``, float64.
        resamples: draws of as many units as there are, with replacement.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    units = len(sums)
    at_once = max(1, _DRAWS_AT_ONCE // units)
    means = []
    for first in range(0, resamples, at_once):
        shape = (min(at_once, resamples - first), units)
        drawn = torch.randint(units, shape, generator=generator)
        means.append(sums[drawn].sum(dim=1) / tokens[drawn].sum(dim=1))
    tail = (1 - LEVEL) / 2
    ends = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def student_interval(sums: Tensor, tokens: Tensor) -> tuple[float, float]:
    r"""Give the t interval of a ratio estimate :math:`R = \sum d / \sum n`.

    The standard error is that of the residuals :math:`d_u - R n_u`, with units - 1 degrees of
    freedom.

    Args:
        sums: ``(units,)``, float64, at least two.
        tokens: ``(units,)``, float64.

    Source:
        Cochran, Sampling Techniques (3rd ed.), section 6.4, ratio estimates.
    """
    units = len(sums)
    ratio = float(sums.sum() / tokens.sum())
    residuals = sums - ratio * tokens
    error = math.sqrt(units / (units - 1) * float(residuals.square().sum())) / float(tokens.sum())
    margin = student_quantile(units - 1) * error
    return ratio - margin, ratio + margin


def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """Give the t for which ``P(|T| <= t) = level`` with that many degrees of freedom."""
    low, high = 0.0, 1.0
    while _student_mass(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_mass(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return high


def _student_mass(t: float, degrees: int) -> float:
    """Give ``P(|T| <= t)``, by the finite series for whole degrees of freedom.

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
