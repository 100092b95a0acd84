import math

import pytest
import torch
from torch import Tensor

from memlayer.evaluation.statistics import (
    MIN_UNITS,
    Interval,
    Method,
    bootstrap_interval,
    paired_interval,
    student_interval,
    student_quantile,
)

TRUTH = -0.01


def sample(units: int, seed: int) -> tuple[Tensor, Tensor]:
    """Documents of unequal length whose loss falls by 0.01 nats a token, give or take 0.005."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5_000, 12_000, (units,), generator=generator).double()
    noise = torch.randn(units, generator=generator, dtype=torch.float64)
    return tokens * (TRUTH + 0.005 * noise), tokens


def interval(sums: Tensor, tokens: Tensor, method: Method) -> Interval:
    return paired_interval(
        sums, tokens, method=method, condition="memory", against="off", resamples=500, seed=0
    )


def coverage(units: int, method: str, repeats: int = 400) -> float:
    hits = 0
    for seed in range(repeats):
        sums, tokens = sample(units, seed)
        low, high = (
            student_interval(sums, tokens)
            if method == "student"
            else bootstrap_interval(sums, tokens, resamples=500, seed=seed)
        )
        hits += low <= TRUTH <= high
    return hits / repeats


# With 400 repeats the standard error of a coverage of 0.95 is 0.011: three of them are allowed.
def test_the_bootstrap_covers_the_truth_with_many_units() -> None:
    assert 0.91 <= coverage(40, "bootstrap") <= 0.98


def test_students_interval_covers_the_truth_even_with_four_units() -> None:
    assert 0.915 <= coverage(4, "student") <= 0.985


def test_the_bootstrap_is_too_narrow_with_four_units_as_the_docs_say() -> None:
    assert coverage(4, "bootstrap") < 0.87


@pytest.mark.parametrize("method", ["documents", "documents-t", "blocks"])
def test_a_uniform_improvement_is_negative_and_excludes_zero(method: Method) -> None:
    sums, tokens = sample(20, seed=1)
    result = interval(sums, tokens, method)
    assert result.high is not None
    assert result.low is not None
    assert result.low < result.difference < result.high < 0
    assert result.excludes_zero


@pytest.mark.parametrize("method", ["documents", "documents-t", "blocks"])
def test_swapping_the_two_conditions_turns_the_sign(method: Method) -> None:
    sums, tokens = sample(20, seed=2)
    there, back = interval(sums, tokens, method), interval(-sums, tokens, method)
    assert there.difference == pytest.approx(-back.difference)
    assert there.low is not None
    assert there.low == pytest.approx(-(back.high or 0.0))


def test_no_difference_gives_an_interval_around_zero() -> None:
    generator = torch.Generator().manual_seed(3)
    sums = torch.randn(50, generator=generator, dtype=torch.float64)
    assert not interval(sums - sums.mean(), torch.full((50,), 100.0), "documents").excludes_zero


def test_the_difference_is_pooled_over_tokens_not_over_units() -> None:
    result = interval(torch.tensor([-10.0, 0.0]), torch.tensor([10.0, 990.0]), "documents-t")
    assert result.difference == pytest.approx(-0.01)


def test_the_same_seed_gives_the_same_interval() -> None:
    sums, tokens = sample(10, seed=4)
    first = bootstrap_interval(sums, tokens, resamples=1000, seed=7)
    assert first == bootstrap_interval(sums, tokens, resamples=1000, seed=7)
    assert first != bootstrap_interval(sums, tokens, resamples=1000, seed=8)


@pytest.mark.parametrize("method", ["documents", "documents-t", "blocks"])
def test_too_few_units_give_a_difference_but_no_interval(method: Method) -> None:
    sums, tokens = sample(MIN_UNITS[method] - 1, seed=5)
    result = interval(sums, tokens, method)
    assert (result.low, result.high, result.excludes_zero) == (None, None, False)
    assert math.isfinite(result.difference)
    assert result.units == MIN_UNITS[method] - 1


# From printed tables of the t distribution, two-sided 95 %.
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (100, 1.984)],
)
def test_students_quantile_is_the_tables(degrees: int, expected: float) -> None:
    assert student_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def test_students_interval_of_equal_units_is_the_textbooks_t_interval() -> None:
    means = torch.tensor([0.1, 0.3, 0.2, 0.6], dtype=torch.float64)
    low, high = student_interval(means * 50, torch.full((4,), 50.0, dtype=torch.float64))
    margin = 3.182446 * float(means.std()) / 2
    assert (low, high) == pytest.approx((0.3 - margin, 0.3 + margin), rel=1e-6)
