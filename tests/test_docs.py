"""What the documentation shows is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from memlayer.decoders import find_parts
from memlayer.discovery import discover
from memlayer_adapters.hunyuan import HUNYUAN

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plugins.md"
FILE_BLOCK = re.compile(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def example(tmp_path):
    """The package of docs/plugins.md that stands nowhere else, installed."""
    for name, content in FILE_BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if name.startswith("examples/"):
            continue
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    info = tmp_path / "memlayer_example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    entries = project["entry-points"]["memlayer"].items()
    (info / "entry_points.txt").write_text(
        "\n".join(["[memlayer]", *(f"{name} = {target}" for name, target in entries)])
    )
    return tmp_path


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_the_files_that_the_documentation_quotes_are_the_files():
    quoted = [
        (ROOT / name, content)
        for name, content in FILE_BLOCK.findall(PAGE.read_text(encoding="utf-8"))
        if name.startswith("examples/")
    ]
    assert len(quoted) == 4
    for path, content in quoted:
        assert content == path.read_text(encoding="utf-8")


def test_the_plugin_of_the_documentation_is_found(example):
    listed = python(example, "-c", "from memlayer_cli.main import main; main()", "plugins")
    assert re.search(r"adapter\W+starcoder2\W+memlayer-example 1.0\W+available", listed)
    assert re.search(r"task\W+colours\W+memlayer-example 1.0\W+available", listed)
    assert "failed" not in listed


def test_the_task_of_the_documentation_is_a_command(example, tiny_checkpoint):
    call = ["eval", "colours", "--backbone", str(tiny_checkpoint("llama")), "--doors", "3"]
    main = "from memlayer_cli.main import main; main()"
    shown = python(example, "-c", main, *call, "--no-memory")
    assert "colours: 3 items" in shown
    assert "Doors of the house" in python(example, "-c", main, "eval", "colours", "--help")


def test_the_plugin_of_the_documentation_passes_its_own_tests(example):
    output = python(example, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert "1 passed" in output
    assert "failed" not in output


def test_the_description_that_docs_adapters_shows_passes_the_suite_of_families() -> None:
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(block, names)
    # The real one, which no adapter would be needed for if discovery could find it.
    assert names["HUNYUAN"] == HUNYUAN
    suite = names["TestBloom"]()
    backbone = suite.make_backbone().eval()
    described = find_parts(backbone, names["BLOOM"])
    found = discover(backbone)
    for name in ("query", "key", "value"):
        own, other = getattr(described.description, name), getattr(found.description, name)
        assert (own.module, own.heads) == (other.module, other.heads)
    for name in ("decoder", "layers", "final_norm", "num_key_value_heads", "head_dim"):
        assert getattr(described, name) == getattr(found, name)
    suite.test_an_untrained_network_without_memory_is_the_backbone()
