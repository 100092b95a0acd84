"""What docs/backends.md says, against the code."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from memlayer import RetrievalBackend
from memlayer.plugins import default_plugins
from memlayer.testing import BackendConformance
from memlayer_backends.auto import AutoBackend, AutoOptions
from memlayer_backends.faiss_cpu import FaissBackend
from memlayer_backends.faiss_gpu import FaissGpuBackend
from memlayer_backends.hnswlib_graph import HnswlibBackend
from memlayer_backends.torch_exact import TorchBackend

PAGE = Path(__file__).parents[2].joinpath("docs", "backends.md").read_text(encoding="utf-8")


def example() -> type[RetrievalBackend]:
    (code,) = re.findall(r"```python\n(# memlayer_mine/backend\.py.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "memlayer_mine.backend"}
    exec(code, names)
    return names["MineBackend"]


class TestTheExample(BackendConformance):
    backend = "mine"

    def make_backend(self, lanes: int, dim: int, **options: Any) -> RetrievalBackend:
        return example()(lanes=lanes, dim=dim, **options)

    def make_with_defaults(self, lanes: int, dim: int) -> RetrievalBackend:
        return self.make_backend(lanes, dim)


def test_every_backend_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", PAGE.partition("## Options")[0], re.MULTILINE)
    ours = [
        entry.name
        for entry in default_plugins().backends.entries()
        if entry.target.startswith("memlayer_backends.")
    ]
    assert sorted(rows) == ours


def test_every_option_has_its_row_and_default() -> None:
    table = PAGE.partition("## Options")[2].partition("## How")[0]
    rows: dict[tuple[str, str], str] = {}
    backend = ""
    for name, option, default in re.findall(
        r"^\|(?: `([a-z-]+)`)? \| `([a-z_]+)` \| ([^|]*) \|", table, re.MULTILINE
    ):
        backend = name or backend
        rows[backend, option] = default
    kinds = {
        backend.name: backend.options_type
        for backend in (TorchBackend, FaissBackend, FaissGpuBackend, HnswlibBackend)
    } | {AutoBackend.name: AutoOptions}
    options = {
        (name, item.name): item.default for name, kind in kinds.items() for item in fields(kind)
    }
    assert set(rows) == set(options)
    for place, default in options.items():
        if default is not None:
            assert rows[place] == str(default).lower()
