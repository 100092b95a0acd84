import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memlayer import ConfigError, StorageError
from memlayer.benchmarking import (
    BackendSetup,
    BenchmarkOptions,
    BenchmarkResult,
    read_table,
    run_benchmark,
    save_table,
    table_path,
)


@pytest.fixture(scope="module")
def result() -> BenchmarkResult:
    return run_benchmark(
        BenchmarkOptions(
            backends=[BackendSetup.parse("torch:block_megabytes=1")],
            tokens=(256,),
            queries=(1, 4),
            heads=1,
            head_dim=8,
            rounds=1,
        )
    )


def test_a_table_is_read_as_it_was_measured(result, tmp_path) -> None:
    assert read_table(save_table(result, tmp_path / "new" / "cpu.json")) == result.table


def test_it_is_kept_in_the_users_cache(result, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert save_table(result) == tmp_path / "memlayer" / "bench" / "cpu.json" == table_path("cpu")
    assert read_table(table_path("cpu")) == result.table


def test_a_benchmark_that_is_not_whole_is_not_saved(result, tmp_path) -> None:
    from dataclasses import replace

    for part, why in (
        (replace(result, interrupted=True), "was interrupted"),
        (replace(result, table=replace(result.table, measurements=())), "measured nothing"),
    ):
        with pytest.raises(ConfigError, match=why):
            save_table(part, tmp_path / "cpu.json")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(result, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_table(result, tmp_path / "file" / "cpu.json")


def test_a_missing_table_names_the_command(tmp_path) -> None:
    with pytest.raises(ConfigError, match="'memlayer bench --save' makes one"):
        read_table(tmp_path / "cpu.json")


def changed(*path: Any, value: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        place: Any = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


FIRST = ("measurements", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format_version", value=2), "has format_version 2, this memlayer reads 1"),
        (changed("surprise", value=1), "unknown field 'surprise'"),
        (changed("measurements", value=[]), "measurements must be a list of at least one"),
        (changed("lanes", value=0), "lanes must be a whole number of at least 1, got 0"),
        (changed("machine", value="PC"), "machine must be an object"),
        (changed("machine", "libraries", "torch", value=2), "libraries.torch must be text"),
        (changed(*FIRST, "size", value=-4), r"measurements\[0\]\.size must be a whole number"),
        (changed(*FIRST, "exact", value=1), "exact must be true or false, got 1"),
        (changed(*FIRST, "recall", value=1.1), "recall must be a number of at least 0 and at most"),
        (changed(*FIRST, "append", value=float("nan")), "append must be a number of at least 0"),
        (changed(*FIRST, "add", value=float("inf")), "add must be a number of at least 0"),
        (changed(*FIRST, "add", value=True), "add must be a number of at least 0"),
        (changed(*FIRST, "options", value=[]), "options must be an object"),
        (changed(*FIRST, "search", value=[]), "search must be times by rising queries"),
        (
            changed(*FIRST, "search", 0, "queries", value=5),
            "search must be times by rising queries",
        ),
    ],
)
def test_a_damaged_table_is_refused_with_the_field(result, tmp_path, change, message) -> None:
    content = result.to_dict()
    change(content)
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_table(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is damaged"):
        read_table(tmp_path / "cpu.json")
