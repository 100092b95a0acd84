import logging
import sys

import pytest

from memlayer import ConfigError
from memlayer_backends import auto
from memlayer_backends.auto import LARGE_LANE, AutoBackend


def test_auto_is_exact_unless_asked_otherwise() -> None:
    for options in (
        {},
        {"expected_size": 10 * LARGE_LANE},
        {"approximate": True},
        {"approximate": True, "expected_size": LARGE_LANE - 1},
    ):
        assert AutoBackend(lanes=1, dim=4, **options).choice == "torch"


def test_auto_takes_graphs_for_long_lanes_where_an_approximation_will_do() -> None:
    pytest.importorskip("hnswlib")
    backend = AutoBackend(lanes=1, dim=4, approximate=True, expected_size=LARGE_LANE)
    assert backend.choice == "hnswlib"
    assert backend.reason == f"approximate, as asked for, with {LARGE_LANE} vectors a lane on a CPU"


def test_auto_takes_what_is_installed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    backend = AutoBackend(lanes=1, dim=4, approximate=True, expected_size=LARGE_LANE)
    assert backend.choice == "torch"
    assert "hnswlib is not installed" in backend.reason


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    auto._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="memlayer_backends.auto"):
        for _ in range(3):
            backend = AutoBackend(lanes=1, dim=4)
    assert caplog.messages == [f"retrieval backend torch: {backend.reason}"]


def test_auto_names_its_options() -> None:
    with pytest.raises(ConfigError, match="no option 'size'; known: approximate, expected_size"):
        AutoBackend(lanes=1, dim=4, size=3)


@pytest.mark.parametrize(("option", "value"), [("expected_size", 0), ("approximate", 1)])
def test_auto_refuses_a_wrong_value(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be .*, got {value}"):
        AutoBackend(lanes=1, dim=4, **{option: value})
