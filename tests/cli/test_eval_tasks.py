"""``memlayer eval TASK``: commands that are made from the registered tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from memlayer import hookimpl
from memlayer.evaluation.tasks.task import Item, Task
from memlayer.options_help import field_docs
from memlayer.plugins import Plugins, default_plugins
from memlayer.registry import Source
from memlayer_cli.main import run

if TYPE_CHECKING:
    from conftest import Remembering


@dataclass(frozen=True, kw_only=True)
class EchoOptions:
    words: tuple[str, ...] = ("rope", "mill")
    """Words to ask
    for, each an ``item``."""


class Echo(Task):
    """Asks for words that its memory holds."""

    name = "echo"
    summary = "Words again."
    answering: ClassVar[Any] = "choice"
    needs_data = False
    options_type = EchoOptions

    def items(self, data: Path | None, split: str, tokenizer: Any) -> Iterator[Item]:
        for word in self.options.words:
            yield Item(
                id=word, group=word, memory=word, prompt="word:", choices=(f" {word}", " no")
            )


@dataclass(frozen=True, kw_only=True)
class ClashingOptions:
    device: str = "a"
    """Of the task."""


class Clashing(Echo):
    options_type = ClashingOptions


class NoTask: ...


@pytest.fixture
def plugins() -> Plugins:
    """Memlayer's own plug-ins, and one with a good task and three bad ones."""

    class Plugin:
        @hookimpl
        def register_tasks(self, register: Any) -> None:
            register("echo", f"{__name__}:Echo")
            register("clashing", f"{__name__}:Clashing")
            register("gone", "memlayer_gone.tasks:Gone")
            register("none", f"{__name__}:NoTask")

    loaded = Plugins()
    for plugin in default_plugins().loaded:
        loaded.add(plugin.plugin, plugin.source)
    loaded.add(Plugin(), Source(plugin="echoes", distribution="echoes", version="1"))
    return loaded


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())


def _this_module() -> Any:
    import types

    module = types.ModuleType(__name__)
    module.__dict__.update(globals())
    return module


def test_a_plug_ins_task_is_a_command_with_its_own_options(
    plugins: Plugins, remembering: Remembering, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["eval", "echo", "--checkpoint", str(remembering.checkpoint), "--json", "-"]
    assert run([*call, "--words", "rope", "--words", "sea", "--words", "hill"], plugins) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["per_item"]) == ["rope", "sea", "hill"]
    assert set(found["conditions"]) == {"backbone", "no_memory", "memory"}
    assert found["settings"]["task_options"] == {"words": ["rope", "sea", "hill"]}
    assert run([*call[:-2], "--max-items", "1", "--foreign-memory"], plugins) == 2
    assert "at least two groups, got 'rope' alone" in capsys.readouterr().err


def test_the_table_shows_conditions_and_differences(
    plugins: Plugins, remembering: Remembering, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "echo", "--checkpoint", str(remembering.checkpoint)], plugins) == 0
    shown = capsys.readouterr().out
    assert "echo: 2 items" in shown
    assert "no_memory" in shown
    assert "differences over the same items" in shown
    assert run(["eval", "echo", "--backbone", str(remembering.backbone)], plugins) == 0
    assert "differences" not in capsys.readouterr().out


def test_help_lists_every_task_and_what_a_broken_one_lacks(
    plugins: Plugins, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "--help"], plugins) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("perplexity", "icl", "passkey", "echo", "gone", "clashing", "none"):
        assert name in shown
    assert "Words again." in shown
    assert run(["eval", "echo", "--help"], plugins) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Words to ask for, each an item." in shown
    assert "Asks for words that its memory holds." in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "memlayer_gone"),
        ("clashing", "task 'clashing' has an option 'device', which every task has already"),
        ("none", "no subclass of Task"),
    ],
)
def test_a_broken_task_says_what_is_wrong(
    name: str, message: str, plugins: Plugins, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", name], plugins) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_a_user_gets_wrong(
    remembering: Remembering, tmp_path: Path, usage_error: Callable[..., str]
) -> None:
    model = ["--checkpoint", remembering.checkpoint]
    assert "task 'icl' reads files; give the folder" in usage_error("eval", "icl", *model)
    assert "there is no" in usage_error("eval", "kv", *model, "--data", tmp_path)
    assert "give either a checkpoint or a backbone" in usage_error("eval", "passkey")
    assert "pairs must be 75 or 140, got 3" in usage_error("eval", "kv", "--pairs", 3)
    assert "max_items must be a whole number" in usage_error("eval", "kv", "--max-items", 0)


def test_a_built_in_task_runs_from_the_command_line(
    remembering: Remembering, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lengths", "128", "--per-length", "2", "--segment-length", "64"]
    model = ["--checkpoint", str(remembering.checkpoint)]
    assert run(["eval", "passkey", *model, *options, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["items"] == 2
    assert found["metrics"] == ["accuracy"]


def test_every_field_of_an_options_class_needs_a_docstring() -> None:
    @dataclass(frozen=True)
    class Silent:
        number: int = 1

    from memlayer.errors import PluginError

    with pytest.raises(PluginError, match="field 'number' of Silent has no docstring under it"):
        field_docs(Silent)
