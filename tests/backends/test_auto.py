import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memlayer import ConfigError, RetrievalBackend
from memlayer.benchmarking import BackendSetup, MeasuredTable, read_table
from memlayer.benchmarking.machine import Machine
from memlayer.benchmarking.results import Measurement, SearchTime
from memlayer.benchmarking.table import table_path
from memlayer.memory import MemoryBank
from memlayer_backends import _auto_plan, auto
from memlayer_backends.auto import AutoBackend
from memlayer_backends.torch_exact import TorchBackend

TORCH, FAISS, GRAPHS = (BackendSetup(name=name) for name in ("torch", "faiss", "hnswlib"))


def measured(
    setup: BackendSetup,
    size: int,
    seconds: float,
    *,
    recall: float | None = None,
    append: float = 0.0,
    many: float | None = None,
) -> Measurement:
    """Give a backend that takes some seconds a query, or others where it has 1,000 at once."""
    times = [(1, seconds), (1_000, 1_000 * (seconds if many is None else many))]
    return Measurement(
        setup=setup,
        size=size,
        exact=recall is None,
        recall=1.0 if recall is None else recall,
        recall_after_turn=1.0 if recall is None else recall,
        add=0.0,
        append=append,
        search=tuple(
            SearchTime(queries=number, seconds=value, low=value, high=value)
            for number, value in times
        ),
    )


@pytest.fixture
def use_table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make ``auto`` choose by these measurements, of one lane."""

    def use(*measurements: Measurement) -> None:
        table = MeasuredTable(
            machine=Machine(processor="Engine", device="cpu", threads=2, python="3", libraries={}),
            date="2026-01-01",
            vectors="made up",
            lanes=1,
            dim=4,
            k=2,
            measurements=measurements,
        )
        monkeypatch.setattr(_auto_plan, "find_table", lambda _: table)

    return use


def two_steps(use_table: Callable[..., None], **faster: Any) -> None:
    """Make torch better below 64 vectors a lane, and faiss from there on."""
    use_table(
        measured(TORCH, 32, 1.0),
        measured(FAISS, 32, 2.0),
        measured(TORCH, 128, 2.0),
        measured(FAISS, 128, 1.0, **faster),
    )


def chosen(**options: Any) -> list[tuple[int, str]]:
    return [
        (step.from_size, str(step.setup)) for step in AutoBackend(lanes=1, dim=4, **options).steps
    ]


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, n, 4, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- by what is stored


def test_it_changes_as_the_memory_grows_and_keeps_ids_and_numbering(use_table) -> None:
    two_steps(use_table)
    backend = AutoBackend(lanes=2, dim=4)
    backend.add(keys(40))
    backend.remove_oldest(5, [1])
    assert backend.choice == "torch"
    before = backend._engine.buffer
    backend.add(keys(23, seed=1))
    assert backend.choice == "torch"
    spike = torch.full((2, 1, 4), 100.0)
    backend.add(spike)
    assert backend.choice == "faiss"
    assert backend._engine.buffer is before
    assert backend.counts().tolist() == [64, 59]
    assert backend.search(spike, 1).ids.flatten().tolist() == [63, 63]
    backend.add(2 * spike)
    assert backend.search(spike, 2).ids.tolist() == [[[64, 63]]] * 2


def test_a_full_memory_near_a_point_of_change_does_not_go_to_and_fro(use_table) -> None:
    two_steps(use_table)
    backend = AutoBackend(lanes=2, dim=4)
    backend.add(keys(70))
    engine = backend._engine
    for seed in range(5):
        backend.remove_oldest(30)
        backend.add(keys(30, seed=seed))
        assert backend._engine is engine
    backend.remove_oldest(39)
    assert backend.choice == "torch"


def test_clearing_begins_with_the_first_backend_again(use_table) -> None:
    two_steps(use_table)
    backend = AutoBackend(lanes=2, dim=4)
    backend.add(keys(70))
    backend.clear([0])
    assert backend.choice == "faiss"
    backend.clear()
    assert backend.choice == "torch"
    backend.add(keys(1))
    assert backend.search(keys(1), 1).ids.tolist() == [[[0]], [[0]]]


@pytest.mark.parametrize(("stored", "choice"), [(70, "faiss"), (3, "torch")])
def test_what_is_loaded_is_searched_by_what_suits_its_size(
    use_table, tmp_path, stored, choice
) -> None:
    two_steps(use_table)
    saved = AutoBackend(lanes=2, dim=4)
    saved.add(keys(stored))
    saved.save(tmp_path)
    backend = AutoBackend(lanes=2, dim=4)
    backend.add(keys(70 if choice == "torch" else 3))
    backend.load(tmp_path)
    assert backend.choice == choice
    assert backend.counts().tolist() == [stored, stored]


def test_a_memory_bank_whose_index_changes_reads_what_one_with_torch_reads(use_table) -> None:
    two_steps(use_table)

    def bank(kind: Callable[..., RetrievalBackend]) -> MemoryBank:
        return MemoryBank(
            capacity=400,
            chunk_size=4,
            top_k=16,
            num_layers=1,
            num_key_value_heads=2,
            head_dim=4,
            make_index=lambda lanes: kind(lanes=lanes, dim=4),
        )

    generator = torch.Generator().manual_seed(0)
    changing, plain = bank(AutoBackend), bank(TorchBackend)
    choices = []
    for _ in range(9):
        written = torch.randn(2, 2, 100, 4, generator=generator)
        for memory in (changing, plain):
            memory.write(written, written.flip(-1))
        choices.append(changing._indexes[0].choice)
        queries = torch.randn(2, 4, 5, 4, generator=generator)
        assert torch.equal(changing.retrieve(queries).ids, plain.retrieve(queries).ids)
    assert choices == ["torch"] * 2 + ["faiss"] * 7


def test_an_expected_size_is_chosen_for_once_and_for_all(use_table) -> None:
    two_steps(use_table)
    backend = AutoBackend(lanes=2, dim=4, expected_size=1_000)
    assert backend.choice == "faiss"
    assert backend.reason.startswith("for an expected_size of 1,000: exact, and takes")
    backend.add(keys(70))
    backend.clear()
    assert backend.choice == "faiss"
    assert chosen(expected_size=63) == [(0, "torch")]
    assert chosen(expected_size=64) == [(0, "faiss")]


# ---------------------------------------------------------------- by what was measured


def test_it_is_exact_unless_asked_otherwise(use_table) -> None:
    pytest.importorskip("hnswlib")
    use_table(measured(TORCH, 100, 2.0), measured(GRAPHS, 100, 1.0, recall=0.97))
    assert chosen() == [(0, "torch")]
    assert chosen(approximate=True) == [(0, "hnswlib")]
    assert chosen(approximate=True, minimum_recall=0.98) == [(0, "torch")]


def test_it_says_how_the_chosen_one_compares(use_table) -> None:
    use_table(measured(TORCH, 1_000, 2e-6), measured(FAISS, 1_000, 3e-6))
    assert AutoBackend(lanes=1, dim=4).reason == (
        "exact, and takes 2 µs a query with its writes against 3 µs of faiss, as measured with "
        "1,000 vectors a lane on Engine"
    )


def test_it_says_that_none_finds_enough(use_table) -> None:
    use_table(measured(TORCH, 100, 2.0), measured(GRAPHS, 100, 1.0, recall=0.5))
    reason = AutoBackend(lanes=1, dim=4, approximate=True).reason
    assert reason.endswith("; approximate ones that find 0.95 were sought, and others found 0.500")


def test_what_a_memory_costs_to_write_counts(use_table) -> None:
    pytest.importorskip("hnswlib")
    use_table(measured(TORCH, 100, 3.0), measured(GRAPHS, 100, 1.0, recall=1.0, append=10.0))
    assert chosen(approximate=True) == [(0, "torch")]
    assert chosen(approximate=True, writes_per_query=0) == [(0, "hnswlib")]


def test_the_number_of_queries_counts(use_table) -> None:
    use_table(measured(TORCH, 100, 4.0, many=1.0), measured(FAISS, 100, 2.0, many=1.5))
    assert chosen(queries=1) == [(0, "faiss")]
    assert chosen(queries=1_000) == chosen(queries=5_000) == [(0, "torch")]
    # Halfway in the logarithm: 2 against sqrt(3).
    assert chosen(queries=32) == [(0, "faiss")]
    # Both weighed: 2 against sqrt(3).
    assert chosen() == [(0, "faiss")]


def test_a_small_advantage_changes_nothing(use_table) -> None:
    two_steps(use_table)
    assert chosen() == [(0, "torch"), (64, "faiss")]
    use_table(
        measured(TORCH, 32, 1.0),
        measured(FAISS, 32, 2.0),
        measured(TORCH, 128, 1.0),
        measured(FAISS, 128, 0.95),
    )
    assert chosen() == [(0, "torch")]


def test_what_was_too_slow_to_be_measured_is_not_returned_to(use_table) -> None:
    pytest.importorskip("hnswlib")
    use_table(
        measured(TORCH, 32, 2.0),
        measured(GRAPHS, 32, 1.0, recall=1.0),
        measured(TORCH, 128, 8.0),
    )
    assert chosen(approximate=True) == [(0, "hnswlib")]
    reason = AutoBackend(lanes=1, dim=4, approximate=True, expected_size=128).reason
    assert reason.endswith(": as for fewer vectors; it was not measured with 128 a lane")


# ---------------------------------------------------------------- by what is here


def test_it_takes_what_is_installed_and_says_so(use_table, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    use_table(measured(TORCH, 100, 2.0), measured(GRAPHS, 100, 1.0, recall=1.0))
    backend = AutoBackend(lanes=1, dim=4, approximate=True)
    assert backend.choice == "torch"
    assert "; hnswlib is quicker, but needs the Python package hnswlib" in backend.reason


@pytest.mark.parametrize(
    ("setup", "why"),
    [
        (BackendSetup(name="gone"), "unknown backend 'gone'"),
        (BackendSetup(name="auto"), "backend 'auto' cannot take over vectors"),
        (BackendSetup(name="torch", options={"colour": 1}), "backend 'torch' has no option"),
        (GRAPHS, "it is exact no more"),
    ],
)
def test_a_backend_that_cannot_be_used_is_passed_over_with_the_reason(
    use_table, setup, why
) -> None:
    if setup is GRAPHS:
        pytest.importorskip("hnswlib")
    use_table(measured(TORCH, 100, 2.0), measured(setup, 100, 1.0))
    backend = AutoBackend(lanes=1, dim=4)
    assert backend.choice == "torch"
    assert f"{setup} is quicker, but {why}" in backend.reason


def test_a_table_of_which_nothing_can_be_used_leaves_torch(use_table) -> None:
    use_table(measured(BackendSetup(name="gone"), 100, 1.0))
    backend = AutoBackend(lanes=1, dim=4)
    assert backend.choice == "torch"
    assert backend.reason == "exact, and nothing in the measured table can be used"


def test_where_nothing_can_be_used_at_one_size_others_still_count(use_table) -> None:
    use_table(measured(BackendSetup(name="gone"), 32, 1.0), measured(FAISS, 128, 1.0))
    assert chosen() == [(0, "torch"), (64, "faiss")]


def test_options_of_the_table_are_used(use_table) -> None:
    setup = BackendSetup(name="torch", options={"block_megabytes": 1})
    use_table(measured(setup, 100, 1.0))
    backend = AutoBackend(lanes=1, dim=4)
    assert backend.choice == "torch:block_megabytes=1"
    assert backend._engine.options.block_megabytes == 1


def test_a_device_without_a_table_is_searched_by_torch_and_that_is_said() -> None:
    backend = AutoBackend(lanes=1, dim=4, device="meta")
    assert backend.choice == "torch"
    assert "nothing was measured on meta ('memlayer bench --save' does)" in backend.reason


@pytest.mark.gpu
def test_on_a_gpu_what_keeps_its_vectors_on_the_cpu_is_passed_over(use_table) -> None:
    pytest.importorskip("faiss")
    use_table(measured(TORCH, 100, 2.0), measured(FAISS, 100, 1.0))
    backend = AutoBackend(lanes=1, dim=4, device="cuda")
    assert backend.choice == "torch"
    assert "; faiss is quicker, but it keeps its vectors on the CPU" in backend.reason


def test_every_change_is_logged_once_with_its_reason(use_table, caplog) -> None:
    two_steps(use_table)
    auto._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="memlayer_backends.auto"):
        backends = [AutoBackend(lanes=2, dim=4) for _ in range(3)]
        reasons = [backends[0].reason]
        for backend in backends:
            backend.add(keys(70))
        reasons.append(backends[0].reason)
    assert caplog.messages == [
        f"retrieval backend torch: {reasons[0]}",
        f"retrieval backend faiss: {reasons[1]}",
    ]


# ---------------------------------------------------------------- tables


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give the place of the user's own table, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _auto_plan._warn_once.cache_clear()
    path = table_path("cpu")
    path.parent.mkdir(parents=True)
    return path


def shipped() -> Path:
    return Path(_auto_plan.__file__).with_name("auto_cpu.json")


def test_the_table_that_comes_with_memlayer_is_whole(own_table) -> None:
    table = _auto_plan.find_table(torch.device("cpu"))
    assert table == read_table(shipped())
    assert table.machine.device == "cpu"
    steps = AutoBackend(lanes=1, dim=4).steps
    assert steps[0].from_size == 0
    assert [step.from_size for step in steps] == sorted({step.from_size for step in steps})


def test_the_users_own_table_comes_before_it(own_table, caplog) -> None:
    table = json.loads(shipped().read_text())
    here = dataclasses.asdict(Machine.here("cpu"))
    own_table.write_text(json.dumps(table | {"machine": here, "vectors": "mine"}))
    found = _auto_plan.find_table(torch.device("cpu"))
    assert found is not None
    assert found.vectors == "mine"
    assert not caplog.messages


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is damaged"),
        ("[]", "it holds no JSON object"),
        ('{"format_version": 9}', "has format_version 9"),
        ('{"format_version": 1}', "measurements must be a list of objects"),
        (None, "was measured on Elsewhere (cpu), this is"),
    ],
)
def test_a_damaged_or_foreign_table_is_left_aside_with_one_warning(
    own_table, caplog, content, why
) -> None:
    if content is None:
        table = json.loads(shipped().read_text())
        table["machine"]["processor"] = "Elsewhere"
        content = json.dumps(table)
    own_table.write_text(content)
    for _ in range(2):
        assert _auto_plan.find_table(torch.device("cpu")) == read_table(shipped())
    (message,) = caplog.messages
    assert message.startswith("the measured table is left aside: ")
    assert why in message


# ---------------------------------------------------------------- options


def test_auto_names_its_options() -> None:
    with pytest.raises(ConfigError, match="no option 'size'; known: approximate, expected_size"):
        AutoBackend(lanes=1, dim=4, size=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("expected_size", 0),
        ("approximate", 1),
        ("queries", 0),
        ("queries", True),
        ("minimum_recall", 1.5),
        ("minimum_recall", float("nan")),
        ("writes_per_query", -1),
        ("writes_per_query", "1"),
        ("writes_per_query", float("inf")),
    ],
)
def test_auto_refuses_a_wrong_value(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be .*, got {value!r}"):
        AutoBackend(lanes=1, dim=4, **{option: value})
