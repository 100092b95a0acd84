from __future__ import annotations

import json
import re

import pytest

from memlayer.inspection import inspect_prompt
from memlayer.loading import ModelNames, load_model
from memlayer_cli.main import run

PROMPT = "Bring the long"


@pytest.fixture
def inspect(capsys):
    """Run the command and give what it wrote to standard output."""

    def call(*arguments):
        capsys.readouterr()
        assert run(["inspect", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return call


def test_json_is_the_librarys_inspection(remembering, inspect):
    found = json.loads(inspect(*remembering.model, "--prompt", PROMPT, "--json", "-"))
    names = ModelNames(checkpoint=str(remembering.checkpoint))
    loaded = load_model(names, bank=remembering.bank)
    expected = inspect_prompt(loaded.model, loaded.tokenizer, PROMPT).to_dict()
    assert found == json.loads(json.dumps(expected))


def test_the_terminal_shows_tokens_passages_heads_and_documents(remembering, inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = inspect(*remembering.model, "--prompt", PROMPT, "--passages", 2)
    assert PROMPT in shown
    assert f"{len(PROMPT)} tokens of prompt" in shown
    assert f"bits over {len(PROMPT) - 1} tokens" in shown
    assert "tokens that memory helped most" in shown
    assert " 1. mill.txt · token " in shown
    assert " 3. " not in shown
    assert re.search(r"^ 2\.1 +0\.73 ", shown, re.MULTILINE)
    assert "mill.txt            100.0 %" in shown


def test_the_page_is_written(remembering, inspect, tmp_path):
    page = tmp_path / "page.html"
    shown = inspect(*remembering.model, "--prompt", PROMPT, "--html", page)
    assert f"page: {page}" in shown
    text = page.read_text(encoding="utf-8")
    assert f"<title>{PROMPT} · memlayer inspect</title>" in text


def test_a_text_can_be_written_and_inspected_in_one_go(remembering, inspect):
    options = ("--prompt", PROMPT, "--max-new-tokens", 6, "--json", "-")
    found = json.loads(inspect(*remembering.model, *options))
    assert found["prompt_tokens"] == len(PROMPT)
    made = len(found["tokens"]) - len(PROMPT)
    assert 0 < made <= 6
    assert found["summed"] == [len(PROMPT) - 1, len(PROMPT) - 1 + made]


def test_an_inspected_text_can_be_sampled_like_a_generated_one(remembering, inspect, capsys):
    options = ["--prompt", PROMPT, "--max-new-tokens", "9", "--temperature", "2", "--seed", "3"]
    found = json.loads(inspect(*remembering.model, *options, "--json", "-"))
    assert run(["generate", *remembering.model, *options, "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert len(found["tokens"]) == len(PROMPT) + made["new_tokens"]
    text = "".join(token["text"] for token in found["tokens"]).removeprefix(PROMPT)
    assert text.removesuffix("<end>") == made["text"]


def test_without_a_bank_there_is_nothing_to_read(remembering, inspect):
    shown = inspect("--checkpoint", remembering.checkpoint, "--prompt", PROMPT)
    assert "nothing was read: the memory is empty" in shown


def test_a_bank_alone_is_described(remembering, inspect):
    shown = inspect("--bank", remembering.bank)
    assert "holds: 138 of 256 tokens, in chunks of 4" in shown
    assert "mill.txt" in shown
    found = json.loads(inspect("--bank", remembering.bank, "--json", "-"))
    assert found["capacity"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --bank, or a model (--checkpoint, --backbone) and a prompt"),
        (["--bank", "b", "--prompt", "x"], "a prompt needs a model: give --checkpoint or"),
        (["--bank", "b", "--html", "x"], "a prompt needs a model: give --checkpoint or"),
        (
            ["--checkpoint", "a", "--backbone", "b", "--prompt", "x"],
            "give either --checkpoint or --backbone",
        ),
        (
            ["--backbone", "b", "--prompt", "x", "--passages", "0"],
            "passages must be at least 1, got 0",
        ),
        (
            ["--backbone", "b", "--prompt", "x", "--html", "no/such/folder.html"],
            "there is no folder no/such for the page; make it first",
        ),
        (["--backbone", "b", "--prompt", "x", "--html", "."], ". is a folder, not a file"),
        (
            ["--backbone", "b", "--prompt", "x", "--seed", "1"],
            "--temperature, --top-p and --seed need --max-new-tokens",
        ),
    ],
    ids=lambda value: value.split(";")[0][:40] if isinstance(value, str) else "",
)
def test_a_wrong_command_line_is_one_clear_line(arguments, message, usage_error):
    assert message in usage_error("inspect", *arguments)


def test_a_prompt_beyond_the_window_is_refused(remembering, usage_error):
    assert "must fit into one window of 64 tokens, got 65" in usage_error(
        "inspect", *remembering.model, "--prompt", "x" * 65
    )


def test_a_bank_that_is_none_is_named(tmp_path, usage_error):
    assert f"there is no memory bank in {tmp_path}" in usage_error("inspect", "--bank", tmp_path)
