"""Measurements as a file, which `memlayer bench --save` keeps and the backend ``auto`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memlayer.benchmarking.machine import Machine
from memlayer.benchmarking.options import BackendSetup
from memlayer.benchmarking.results import (
    FORMAT_VERSION,
    BenchmarkResult,
    MeasuredTable,
    Measurement,
    SearchTime,
)
from memlayer.cache import user_cache
from memlayer.errors import ConfigError, StorageError
from memlayer.files import write_atomically
from memlayer.json_fields import Fields, read_json_object

LARGEST = 2**22
"""Bytes of a file beyond which it is none of ours."""

_KNOWN = {
    "format_version",
    "machine",
    "date",
    "vectors",
    "lanes",
    "dim",
    "k",
    "measurements",
    "skipped",
    "settings",
    "seconds",
    "interrupted",
}


def table_path(device: str) -> Path:
    """Give the user's own table for a type of device: ``$XDG_CACHE_HOME/memlayer/bench/cpu.json``.

    Args:
        device: cpu, cuda, ...
    """
    return user_cache() / "bench" / f"{device}.json"


def save_table(result: BenchmarkResult, path: Path | None = None) -> Path:
    """Keep a benchmark where the backend ``auto`` looks for it.

    Args:
        result: of a whole benchmark.
        path: where; None: `table_path` of the device that was measured.

    Returns:
        The file.

    Raises:
        ConfigError: if the benchmark was broken off, or measured nothing.
        StorageError: if the file cannot be written.
    """
    if result.interrupted or not result.table.measurements:
        state = "was interrupted" if result.interrupted else "measured nothing"
        raise ConfigError(f"only a whole benchmark is saved, and this one {state}; run it again")
    path = table_path(result.table.machine.device) if path is None else path
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise StorageError(f"cannot write {path} ({error})") from error
    return path


def read_table(path: Path) -> MeasuredTable:
    """Read what `save_table` or `memlayer bench --json` wrote.

    Raises:
        ConfigError: if there is no such file, or it is damaged or of another format.
    """
    try:
        fields = read_json_object(path, largest=LARGEST, error=ConfigError)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no table {path}; 'memlayer bench --save' makes one") from error
    version = fields.whole("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format_version {version}, this memlayer reads {FORMAT_VERSION}; "
            "measure again with 'memlayer bench --save'"
        )
    fields.expect_only(sorted(_KNOWN))
    measurements = tuple(_measurement(item) for item in fields.objects("measurements"))
    if not measurements:
        raise fields.damaged("measurements", "a list of at least one")
    return MeasuredTable(
        machine=_machine(fields.object("machine")),
        date=fields.text("date"),
        vectors=fields.text("vectors"),
        lanes=fields.whole("lanes", least=1),
        dim=fields.whole("dim", least=1),
        k=fields.whole("k", least=1),
        measurements=measurements,
    )


def _machine(fields: Fields) -> Machine:
    fields.expect_only(["processor", "device", "threads", "python", "libraries"])
    libraries = fields.object("libraries")
    return Machine(
        processor=fields.text("processor"),
        device=fields.text("device"),
        threads=fields.whole("threads", least=1),
        python=fields.text("python"),
        libraries={name: libraries.text(name) for name in libraries.values},
    )


def _measurement(fields: Fields) -> Measurement:
    search = tuple(_search_time(item) for item in fields.objects("search"))
    asked = [item.queries for item in search]
    if not asked or asked != sorted(set(asked)):
        raise fields.damaged("search", "times by rising queries")
    options: dict[str, Any] = fields.object("options").values
    return Measurement(
        setup=BackendSetup(name=fields.text("backend"), options=options),
        size=fields.whole("size", least=1),
        exact=fields.truth("exact"),
        recall=fields.number("recall", most=1),
        recall_after_turn=fields.number("recall_after_turn", most=1),
        add=fields.number("add"),
        append=fields.number("append"),
        search=search,
    )


def _search_time(fields: Fields) -> SearchTime:
    return SearchTime(
        queries=fields.whole("queries", least=1),
        seconds=fields.number("seconds"),
        low=fields.number("low"),
        high=fields.number("high"),
    )
