import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer.data.windows import count_windows, places_in_window, windows


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    length = draw(st.integers(1, 40))
    return draw(st.integers(0, 150)), length, draw(st.integers(1, length))


@given(cuts())
def test_every_position_is_scored_exactly_once_and_in_order(cut: tuple[int, int, int]) -> None:
    positions, length, stride = cut
    scored = [
        position
        for window in windows(positions, length, stride)
        for position in range(window.score_from, window.end)
    ]
    assert scored == list(range(positions))


@given(cuts())
def test_windows_start_a_stride_apart_and_never_exceed_the_segment(
    cut: tuple[int, int, int],
) -> None:
    positions, length, stride = cut
    for number, window in enumerate(windows(positions, length, stride)):
        assert window.start == number * stride
        assert window.start <= window.score_from < window.end
        assert window.end == min(window.start + length, positions)


@given(cuts())
def test_positions_outside_the_first_window_have_at_least_segment_less_stride_before_them(
    cut: tuple[int, int, int],
) -> None:
    positions, length, stride = cut
    for window in list(windows(positions, length, stride))[1:]:
        assert window.score_from - window.start >= length - stride


@given(cuts())
def test_the_count_is_the_number_of_windows(cut: tuple[int, int, int]) -> None:
    assert count_windows(*cut) == len(list(windows(*cut)))


# No deadline: the first call pays for torch's start.
@settings(deadline=None)
@given(cuts())
def test_a_place_counts_the_tokens_of_local_context_before_it(cut: tuple[int, int, int]) -> None:
    positions, length, stride = cut
    expected = torch.empty(positions, dtype=torch.int64)
    for position in range(positions):
        # The first window that reads a position scores it.
        number = 0
        while position >= number * stride + length:
            number += 1
        expected[position] = position - number * stride
    torch.testing.assert_close(places_in_window(positions, length, stride), expected)
