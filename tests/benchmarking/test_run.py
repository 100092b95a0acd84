"""The measurement itself, with backends whose faults are known."""

import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from memlayer import ConfigError, SearchResult, UnknownNameError, hookimpl
from memlayer.benchmarking import BackendSetup, BenchmarkOptions, run_benchmark
from memlayer.benchmarking import subject as subject_module
from memlayer.plugins import Plugins, load_plugins
from memlayer_backends.torch_exact import TorchBackend


class Plain(TorchBackend):
    name = "plain"


class HalfBlind(TorchBackend):
    """Finds every other vector only, and says that it may miss some."""

    name = "half-blind"
    worth_measuring: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"block_megabytes": 2})

    @property
    def exact(self) -> bool:
        return False

    def search(self, queries: Tensor, k: int) -> SearchResult:
        found = super().search(queries, 2 * k)
        return SearchResult(scores=found.scores[..., ::2], ids=found.ids[..., ::2])


class Failing(TorchBackend):
    name = "failing"

    def search(self, queries: Tensor, k: int) -> SearchResult:
        raise RuntimeError("out of luck")


class Chooser(TorchBackend):
    worth_measuring: ClassVar[tuple[dict[str, Any], ...]] = ()


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    module = types.ModuleType("measured_backends")
    for kind in (Plain, HalfBlind, Failing, Chooser):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "measured_backends", module)

    class Backends:
        @hookimpl
        def register_backends(self, register) -> None:
            register("plain", "measured_backends:Plain")
            register("half-blind", "measured_backends:HalfBlind")
            register("failing", "measured_backends:Failing")
            register("chooser", "measured_backends:Chooser")
            register("absent", "measured_backends:Absent", requires=("no_such_library",))

    return load_plugins(entry_points=False, extra=(Backends(),))


def options(*names: str, **changes: Any) -> BenchmarkOptions:
    settings: dict[str, Any] = {
        "backends": [BackendSetup.parse(name) for name in names],
        "tokens": (256, 2048),
        "top_k": 32,
        "queries": (1, 8),
        "heads": 2,
        "head_dim": 8,
        "rounds": 2,
    }
    return BenchmarkOptions(**settings | changes)


def test_everything_is_measured_at_every_size(plugins) -> None:
    result = run_benchmark(options("plain", "half-blind"), plugins=plugins)
    table = result.table
    assert [(str(item.setup), item.size) for item in table.measurements] == [
        ("plain", 64),
        ("half-blind", 64),
        ("plain", 512),
        ("half-blind", 512),
    ]
    assert (table.lanes, table.dim, table.k) == (2, 8, 8)
    assert result.skipped == ()
    assert not result.interrupted
    for item in table.measurements:
        assert item.add > 0
        assert item.append > 0
        assert [time.queries for time in item.search] == [1, 8]
        assert all(0 < time.low <= time.seconds <= time.high for time in item.search)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_recall_is_that_of_the_search_before_and_after_a_turn(plugins) -> None:
    result = run_benchmark(options("plain", "half-blind"), plugins=plugins)
    for item in result.table.measurements:
        blind = item.setup.name == "half-blind"
        assert item.exact is not blind
        # Ranks 1, 3, 5, ..., 15, of which half are among the best 8.
        expected = pytest.approx(0.5 if blind else 1.0, abs=0.01)  # ties may be missed or found
        assert item.recall == expected
        assert item.recall_after_turn == expected


def test_what_is_built_when_it_is_asked_counts_as_adding(plugins, monkeypatch) -> None:
    class Clock:
        now = 0.0

    changed = []

    def add(self, keys: Tensor, lanes=None) -> None:
        changed.append(True)
        TorchBackend.add(self, keys, lanes)

    def search(self, queries: Tensor, k: int) -> SearchResult:
        Clock.now += 128.0 if changed else 0.01
        changed.clear()
        return TorchBackend.search(self, queries, k)

    monkeypatch.setattr(Plain, "add", add)
    monkeypatch.setattr(Plain, "search", search)
    monkeypatch.setattr("time.perf_counter", lambda: Clock.now)
    wanted = options("plain", tokens=(256,), budget=1000.0)
    (item,) = run_benchmark(wanted, plugins=plugins).table.measurements
    assert (item.add, item.append) == pytest.approx(
        (1.0, 1.0), rel=1e-3
    )  # 128 s over 2 x 64 vectors
    assert [time.seconds for time in item.search] == pytest.approx([0.01, 0.01])


def test_by_default_all_that_search_themselves_are_measured_as_they_suggest(plugins) -> None:
    result = run_benchmark(options(tokens=(256,)), plugins=plugins)
    assert [str(item.setup) for item in result.table.measurements] == [
        "half-blind",
        "half-blind:block_megabytes=2",
        "plain",
    ]
    assert [(str(item.setup), item.size) for item in result.skipped] == [
        ("absent", None),
        ("failing", 64),
    ]
    assert "no_such_library" in result.skipped[0].reason
    assert result.skipped[1].reason == "it failed: RuntimeError: out of luck"


def test_a_wrong_option_is_said_and_the_others_go_on(plugins) -> None:
    result = run_benchmark(options("plain:colour=1", "plain", tokens=(256,)), plugins=plugins)
    assert [str(item.setup) for item in result.table.measurements] == ["plain"]
    (skipped,) = result.skipped
    assert "has no option 'colour'" in skipped.reason


def test_an_unknown_backend_is_an_error(plugins) -> None:
    with pytest.raises(UnknownNameError, match="unknown backend 'plane'"):
        run_benchmark(options("plane"), plugins=plugins)


def test_a_search_asks_other_queries_each_time(plugins, monkeypatch) -> None:
    asked = []

    def search(self, queries: Tensor, k: int) -> SearchResult:
        asked.append(queries)
        return TorchBackend.search(self, queries, k)

    monkeypatch.setattr(Plain, "search", search)
    run_benchmark(options("plain", tokens=(256,), queries=(1,), rounds=1), plugins=plugins)
    single = [queries for queries in asked if queries.shape[1] == 1]
    assert len(single) > 5
    assert not torch.equal(single[1], single[2])


def test_what_would_take_longer_than_is_left_is_skipped_and_said(plugins, monkeypatch) -> None:
    class Clock:
        now = 0.0

    def add(self, keys: Tensor, lanes=None) -> None:
        Clock.now += 0.01 * keys.shape[1]
        TorchBackend.add(self, keys, lanes)

    monkeypatch.setattr(HalfBlind, "add", add)
    monkeypatch.setattr("time.perf_counter", lambda: Clock.now)
    # A turn adds as many again: 2 * 64 * 0.01 s at the first size, 8 times that at the second.
    monkeypatch.setattr(
        "memlayer.benchmarking.run.interleave",
        lambda sides, **_: [[1e-3] for _ in sides],
    )
    result = run_benchmark(options("plain", "half-blind", budget=10.0), plugins=plugins)
    assert [(str(item.setup), item.size) for item in result.table.measurements] == [
        ("plain", 64),
        ("half-blind", 64),
        ("plain", 512),
    ]
    (skipped,) = result.skipped
    assert (str(skipped.setup), skipped.size) == ("half-blind", 512)
    assert skipped.reason == "it would take about 10 s, of 9 s left; a larger budget has room"


def test_a_build_that_turns_out_too_long_is_given_up(plugins, monkeypatch) -> None:
    class Clock:
        now = 0.0

    def add(self, keys: Tensor, lanes=None) -> None:
        Clock.now += 2.0
        TorchBackend.add(self, keys, lanes)

    monkeypatch.setattr(subject_module, "PIECE", 32)
    monkeypatch.setattr(Plain, "add", add)
    monkeypatch.setattr("time.perf_counter", lambda: Clock.now)
    result = run_benchmark(options("plain", tokens=(2048,), budget=30.0), plugins=plugins)
    assert result.table.measurements == ()
    assert result.skipped[0].reason == (
        "it would take about 32 s, of 30 s left; a larger budget has room"
    )


def test_an_interrupt_gives_what_is_there_and_names_the_rest(plugins) -> None:
    def interrupt(done: int, total: int, what: str | None) -> None:
        if what == "plain, 512 vectors a lane":
            raise KeyboardInterrupt

    result = run_benchmark(options("plain"), plugins=plugins, progress=interrupt)
    assert result.interrupted
    assert [item.size for item in result.table.measurements] == [64]
    assert [(item.size, item.reason) for item in result.skipped] == [(512, "interrupted")]


def test_progress_goes_from_nothing_to_the_whole(plugins) -> None:
    seen = []
    run_benchmark(
        options("plain", "half-blind"), plugins=plugins, progress=lambda *step: seen.append(step)
    )
    assert [step[:2] for step in seen] == [(0, 1152), (64, 1152), (128, 1152), (640, 1152)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "pairs.safetensors"
    tensors = {
        "keys": torch.randn(4, 100, 8, generator=generator),
        "queries": torch.randn(4, 30, 8, generator=generator),
    }
    save_file(tensors, path)
    return path


def test_sizes_that_a_file_of_pairs_lacks_are_skipped_and_said(plugins, pairs) -> None:
    wanted = options("plain", pairs=pairs, heads=None, head_dim=None)
    result = run_benchmark(wanted, plugins=plugins)
    assert [item.size for item in result.table.measurements] == [64]
    assert (result.table.lanes, result.table.vectors) == (4, "real, of pairs.safetensors")
    (skipped,) = result.skipped
    assert (skipped.size, skipped.reason) == (512, "the file has only 100 vectors a lane")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 16}, "head_dim must be that of .*, 8, got 16"),
        ({"queries": (31,)}, "queries must be at most those of .*, 30 a lane, got 31"),
    ],
)
def test_settings_that_a_file_of_pairs_does_not_fit_are_refused(
    plugins, pairs, change, message
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_benchmark(options("plain", pairs=pairs, **change), plugins=plugins)


@pytest.mark.gpu
def test_a_gpu_is_measured_and_named(plugins) -> None:
    result = run_benchmark(options("plain", "half-blind", device="cuda"), plugins=plugins)
    assert result.skipped == ()
    assert result.table.machine.device == "cuda"
    assert result.table.machine.processor == torch.cuda.get_device_name()
    assert [item.recall for item in result.table.measurements if item.exact] == [1.0, 1.0]
