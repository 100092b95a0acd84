from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Annotated

import pytest
import typer

import memlayer
from memlayer import MemlayerError, hookimpl
from memlayer.errors import BackendUnavailableError, ConfigError, TrainingError
from memlayer.plugins import Plugins, load_plugins
from memlayer_cli.main import run

HEAVY = {"torch", "transformers", "numpy", "faiss", "hnswlib", "datasets", "accelerate"}


class Raising:
    """A plug-in whose command ``work`` raises the given error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        app.command("work")(self.work)

    def work(self) -> None:
        """Work."""
        raise self.error


def with_commands(*plugins: object) -> Plugins:
    return load_plugins(entry_points=False, extra=plugins)


def memlayer_process(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    code = "from memlayer_cli.main import main; main()"
    return subprocess.run(
        [sys.executable, *python, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def imported_by(result: subprocess.CompletedProcess) -> set[str]:
    """Give the modules that a process run with ``-X importtime`` imported."""
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "memlayer_cli.main" in imported
    return imported


def test_help_lists_the_commands_and_imports_nothing_heavy():
    result = memlayer_process("--help", python=("-X", "importtime"))
    assert result.returncode == 0
    for command in (
        *("train", "eval", "memorize", "bank", "generate", "inspect", "plugins", "bench"),
        "convert",
    ):
        assert command in result.stdout
    assert not imported_by(result) & HEAVY


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["eval"],
        ["eval", "perplexity"],
        ["memorize"],
        ["bank"],
        ["bank", "info"],
        ["bank", "verify"],
        ["generate"],
        ["inspect"],
        ["plugins"],
        ["bench"],
        ["convert"],
        ["convert", "longmem"],
    ],
    ids=" ".join,
)
def test_every_command_has_help_without_importing_torch(command):
    result = memlayer_process(*command, "--help", python=("-X", "importtime"))
    assert result.returncode == 0
    assert f"memlayer {' '.join(command)}" in result.stdout
    assert not imported_by(result) & HEAVY


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"memlayer {memlayer.__version__}\n"


def test_no_command_shows_the_help(capsys):
    assert run([]) == 0
    assert "Usage: memlayer" in capsys.readouterr().out


def test_a_group_without_a_command_shows_its_help(capsys):
    assert run(["eval"]) == 2
    out, err = capsys.readouterr()
    assert "Usage: memlayer eval" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plugin"], "No such command 'plugin'. Did you mean 'plugins'?; see 'memlayer --help'"),
        (["--colour"], "No such option: --colour; see 'memlayer --help'"),
        (["plugins", "--jsn"], "No such option: --jsn"),
        (["plugins", "--json", "missing/x.json"], "'missing/x.json' is in no existing folder"),
    ],
)
def test_a_usage_mistake_is_one_line_and_exit_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("memlayer: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("top_k must be 4,\n  got 3"), 2, "top_k must be 4, got 3"),
        (BackendUnavailableError("no faiss"), 2, "no faiss"),
        (TrainingError("the loss is nan"), 1, "the loss is nan"),
        (MemlayerError("something"), 1, "something"),
        (
            OSError(28, "No space left on device"),
            1,
            "OSError: [Errno 28] No space left on device (memlayer --debug ... shows where)",
        ),
    ],
    ids=["setting", "missing library", "training", "other", "not ours"],
)
def test_an_error_is_one_line_and_its_exit_code_says_whose_it_is(capsys, error, code, line):
    assert run(["work"], with_commands(Raising(error))) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"memlayer: error: {line}\n")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys):
    error = ConfigError("top_k must be 4")
    assert run(["--debug", "work"], with_commands(Raising(error))) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "raise self.error" in err
    assert err.endswith("memlayer: error: top_k must be 4\n")


def test_an_interrupt_is_one_line_and_exit_130(capsys):
    assert run(["work"], with_commands(Raising(KeyboardInterrupt()))) == 130
    assert capsys.readouterr().err == "memlayer: interrupted\n"


def test_ctrl_c_ends_a_running_command_with_one_line(tmp_path):
    code = """
import time, typer
from memlayer import hookimpl
from memlayer.plugins import load_plugins
from memlayer_cli.main import run

class Slow:
    @hookimpl
    def register_commands(self, app):
        @app.command()
        def work():
            print("working", flush=True)
            time.sleep(60)

raise SystemExit(run(["work"], load_plugins(entry_points=False, extra=[Slow()])))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "memlayer: interrupted\n")


def test_an_installed_command_runs_in_its_own_process():
    environment = {**os.environ, "MEMLAYER_PLUGINS": ""}
    command = os.path.join(os.path.dirname(sys.executable), "memlayer")
    result = subprocess.run(
        [command, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"memlayer {memlayer.__version__}\n"


class Greeting:
    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        @app.command()
        def greet(name: str) -> None:
            """Greet somebody."""
            print(f"hello {name}")


class Taking(Greeting):
    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        app.command("plugins")(lambda: None)


class HalfWay(Greeting):
    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        super().register_commands(app)
        raise RuntimeError("fell over")


class Unbuildable:
    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        @app.command()
        def broken(value: Annotated[str, typer.Option(), typer.Option()]) -> None: ...


class Callback(Greeting):
    @hookimpl
    def register_commands(self, app: typer.Typer) -> None:
        super().register_commands(app)
        app.callback()(lambda: None)


def test_a_plugin_adds_a_command(capsys):
    assert run(["greet", "you"], with_commands(Greeting())) == 0
    assert capsys.readouterr().out == "hello you\n"


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (
            Taking(),
            "command 'plugins' of plug-in 'Taking' is already registered by plug-in 'memlayer' of "
            f"memlayer-lm {memlayer.__version__}, which keeps it",
        ),
        (Unbuildable(), "MultipleTyperAnnotationsError: "),
        (Callback(), "plug-in 'Callback' sets a callback; a plug-in adds commands and groups only"),
    ],
    ids=["taken name", "unbuildable command", "callback"],
)
def test_a_plugin_whose_commands_fail_stops_no_other(capsys, plugin, reason):
    plugins = with_commands(plugin, Greeting())
    assert run(["greet", "you"], plugins) == 0
    out, err = capsys.readouterr()
    assert out == "hello you\n"
    name = type(plugin).__name__
    assert err == f"memlayer: warning: plug-ins that failed: {name}; see 'memlayer plugins'\n"
    (failure,) = plugins.failures
    assert failure.reason.startswith(reason)


def test_a_plugin_that_fails_half_way_adds_no_command(capsys):
    plugins = with_commands(HalfWay())
    assert run(["greet", "you"], plugins) == 2
    assert "No such command 'greet'" in capsys.readouterr().err
    assert [failure.reason for failure in plugins.failures] == ["RuntimeError: fell over"]
