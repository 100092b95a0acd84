import pytest

from memlayer.benchmarking import interleave, timing
from memlayer.benchmarking.timing import Timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed calls move."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_sides_are_timed_in_turn_after_a_call_that_does_not_count(clock) -> None:
    order: list[str] = []

    def side(name: str, first: float, later: float):
        def call() -> None:
            clock.now += later if name in order else first
            order.append(name)

        return call

    seconds = interleave([side("a", 9.0, 1.0), side("b", 9.0, 2.0)], rounds=3)
    assert order == ["a", "b"] * 4
    assert seconds == [[1.0] * 3, [2.0] * 3]


def test_quick_calls_are_repeated_until_the_clock_can_tell(clock) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.25

    assert interleave([call], rounds=2, least_seconds=1.0) == [[0.25, 0.25]]
    assert calls == 1 + 2 * 4


def test_a_timing_is_the_median_and_the_extremes() -> None:
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(median=2.0, low=1.0, high=3.0)
