import json
import re
from pathlib import Path

import pytest

from memlayer.benchmarking import read_table, table_path
from memlayer_cli.main import run

PAGE = Path(__file__).parents[2] / "docs" / "bench.md"
SMALL = ["bench", "--tokens", "256", "--heads", "1", "--head-dim", "8", "--rounds", "1"]
SMALL += ["--queries", "1", "--queries", "4", "--backend", "torch"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")


def test_it_shows_a_table_and_what_was_measured(capsys):
    assert run([*SMALL, "--backend", "torch:block_megabytes=1"]) == 0
    shown = capsys.readouterr().out
    assert "256 tokens: 64 vectors a lane, lanes: 1" in shown
    for name in ("torch", "torch:block_megabytes=1"):
        assert re.search(rf"│ {re.escape(name)} +│ +exact │ +[\d.]+ │ +[\d.]+ │ .* ±\d+ % │", shown)
    assert re.search(r"1 query ┃ +4 queries ┃", shown)
    assert "vectors: synthetic, seed 0; 8 long, 16 found per query" in shown
    assert re.search(r"machine: .+, \d+ threads, .*torch \d", shown)


def test_json_alone_goes_to_standard_output(capsys):
    assert run([*SMALL, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["measurements"]
    assert (row["backend"], row["size"], row["exact"], row["recall"]) == ("torch", 64, True, 1.0)
    assert [time["queries"] for time in row["search"]] == [1, 4]
    assert found["settings"]["tokens"] == [256]
    assert found["skipped"] == []


def test_what_is_skipped_is_shown_with_the_reason(capsys):
    assert run([*SMALL, "--backend", "torch:colour=1"]) == 0
    assert (
        "skipped: torch:colour=1 at 256 tokens: backend 'torch' has no option 'colour'; known:"
        in capsys.readouterr().out
    )


def test_save_keeps_the_table_that_auto_reads(capsys):
    assert run([*SMALL, "--save"]) == 0
    path = table_path("cpu")
    assert f"saved: {path}, by which the backend 'auto' chooses" in capsys.readouterr().out
    assert read_table(path).measurements[0].setup.name == "torch"


def test_nothing_is_saved_unless_asked_for():
    assert run(SMALL) == 0
    assert not table_path("cpu").exists()


def test_json_of_a_file_is_a_table_too(tmp_path):
    assert run([*SMALL, "--json", str(tmp_path / "auto_cpu.json")]) == 0
    assert read_table(tmp_path / "auto_cpu.json").dim == 8


def test_ctrl_c_shows_what_is_there_and_saves_nothing(capsys, monkeypatch):
    from memlayer.benchmarking import subject

    measure = subject.Subject.turn

    def interrupt(self):
        if self._task.keys.shape[1] == 128:
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(subject.Subject, "turn", interrupt)
    assert run([*SMALL, "--tokens", "512", "--save"]) == 130
    shown = capsys.readouterr()
    assert "256 tokens: 64 vectors a lane, lanes: 1" in shown.out
    assert "skipped: torch at 512 tokens: interrupted" in shown.out
    assert "not saved: only a whole benchmark is" in shown.err
    assert shown.err.endswith("memlayer: interrupted\n")
    assert not table_path("cpu").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "torhc"], "unknown backend 'torhc'"),
        (["--backend", "torch:"], "backend must be NAME or NAME:OPTION=VALUE"),
        (["--tokens", "6"], "tokens must be multiples of chunk_size=4, got 6"),
        (["--budget", "0"], "budget must be a number of seconds above 0"),
        (["--pairs", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["--device", "abacus"], "device must be one that torch can use here"),
    ],
)
def test_a_mistake_is_one_line(usage_error, arguments, message):
    assert message in usage_error("bench", *arguments)


def test_every_option_that_the_documentation_names_exists(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE.read_text(encoding="utf-8")))
    assert run(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(named) > 8
    assert [option for option in sorted(named) if f"{option} " not in shown] == []
