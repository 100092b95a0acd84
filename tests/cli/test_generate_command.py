from __future__ import annotations

import io
import json
import sys

import pytest

import memlayer
from memlayer_cli.main import run

PROMPT = "Bring the long"


@pytest.fixture
def generate(capsys):
    """Run the command and give what it wrote to standard output."""

    def call(*arguments):
        capsys.readouterr()
        assert run(["generate", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def generate_json(generate):
    return lambda *arguments: json.loads(generate(*arguments, "--json", "-"))


def pipe(text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_the_text_is_what_generate_gives_over_the_bank(remembering, generate_json):
    found = generate_json(
        *remembering.model, "--prompt", PROMPT, "--greedy", "--max-new-tokens", 12
    )
    model = memlayer.load(remembering.checkpoint)
    model.memory.load(remembering.bank)
    tokenizer = memlayer.load_backbone(str(remembering.backbone)).tokenizer
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert found["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert (found["prompt_tokens"], found["new_tokens"]) == (len(PROMPT), len(new))
    assert found["tokens_per_second"] == pytest.approx(found["new_tokens"] / found["seconds"])


def test_the_bank_changes_the_text_and_can_be_left_unread(remembering, generate_json):
    options = ("--prompt", PROMPT, "--greedy", "--max-new-tokens", 30)
    with_bank = generate_json(*remembering.model, *options)
    without = generate_json("--checkpoint", remembering.checkpoint, *options)
    unread = generate_json(*remembering.model, *options, "--no-memory")
    assert with_bank["text"] != without["text"]
    assert unread["text"] == without["text"]


def test_the_text_is_streamed_and_nothing_else_is_on_standard_output(
    remembering, generate, generate_json, monkeypatch
):
    options = (*remembering.model, "--prompt", PROMPT, "--greedy", "--max-new-tokens", 30)
    whole = generate_json(*options)["text"]
    pieces = []
    monkeypatch.setattr("memlayer_cli.generate._write", pieces.append)
    assert generate(*options) == ""
    assert "".join(pieces) == whole + "\n"


def test_a_file_and_a_pipe_are_prompts_too(remembering, generate_json, tmp_path, monkeypatch):
    options = (*remembering.model, "--greedy", "--max-new-tokens", 8)
    expected = generate_json(*options, "--prompt", PROMPT)["text"]
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n", encoding="utf-8")
    assert generate_json(*options, "--prompt-file", path)["text"] == expected
    for more in ([], ["--prompt-file", "-"]):
        pipe(PROMPT + "\n", monkeypatch)
        assert generate_json(*options, *more)["text"] == expected


def test_a_seed_draws_the_same_text_each_time(remembering, generate_json):
    def drawn(seed):
        options = ("--temperature", 1.5, "--max-new-tokens", 20, "--seed", seed)
        return generate_json(*remembering.model, "--prompt", PROMPT, *options)["text"]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_backbone_alone_takes_the_banks_settings(remembering, generate_json, tmp_path):
    backbone = memlayer.load_backbone(str(remembering.backbone)).model
    config = memlayer.LongMemConfig(
        memory_layers=(0,), memory_size=96, chunk_size=8, segment_length=64
    )
    model = memlayer.wrap(backbone, config)
    model.memorize(model.backbone.dummy_inputs["input_ids"].clamp(max=99)[:1], document="dummy")
    model.memory.save(tmp_path / "bank")
    model.unwrap()
    found = generate_json(
        "--backbone", remembering.backbone, "--bank", tmp_path / "bank", "--prompt", PROMPT
    )
    assert found["new_tokens"] > 0


def test_sources_are_passages_of_the_bank(remembering, generate, generate_json):
    options = (*remembering.model, "--prompt", PROMPT, "--max-new-tokens", 8, "--show-sources")
    shown = generate(*options)
    assert "read most to write this:" in shown
    assert "mill.txt · token " in shown
    sources = generate_json(*options)["sources"]
    assert {passage["document"] for passage in sources["passages"]} == {"mill.txt"}
    assert all("mill" in p["text"] or "rope" in p["text"] for p in sources["passages"])


def test_sources_of_a_text_beyond_the_window_are_those_of_its_end(remembering, generate_json):
    options = ("--prompt", "x" * 50, "--greedy", "--max-new-tokens", 40, "--show-sources")
    found = generate_json(*remembering.model, *options)
    assert found["sources"]["passages"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "give either --checkpoint or --backbone"),
        (
            ["--checkpoint", "a", "--backbone", "b", "--prompt", "x"],
            "give either --checkpoint or --backbone",
        ),
        (
            ["--backbone", "b", "--prompt", "x", "--prompt-file", "y"],
            "--prompt and --prompt-file exclude each other",
        ),
        (["--backbone", "b", "--prompt", " \n"], "the prompt is empty; give it some text"),
        (
            ["--backbone", "b", "--prompt-file", "absent.txt"],
            "cannot read absent.txt: No such file",
        ),
        (
            ["--backbone", "b", "--prompt", "x", "--greedy", "--seed", "1"],
            "greedy and sampling (temperature, top_p, top_k, seed) exclude each other",
        ),
        (
            ["--backbone", "b", "--prompt", "x", "--temperature", "0"],
            "temperature must be above 0, got 0.0; greedy takes the likeliest",
        ),
        (["--backbone", "b", "--prompt", "x", "--top-p", "2"], "top_p must be above 0 and at most"),
        (
            ["--backbone", "b", "--prompt", "x", "--max-new-tokens", "0"],
            "max_new_tokens must be at least 1, got 0",
        ),
        (
            ["--backbone", "b", "--prompt", "x", "--show-sources"],
            "--show-sources needs --bank, and excludes --no-memory",
        ),
        (
            ["--checkpoint", "c", "--prompt", "x", "--segment-length", "64"],
            "segment_length is fixed by the checkpoint 'c', got 64",
        ),
    ],
    ids=lambda value: value.split(";")[0][:40] if isinstance(value, str) else "",
)
def test_a_wrong_command_line_is_one_clear_line(arguments, message, usage_error):
    assert message in usage_error("generate", *arguments)


def test_an_empty_pipe_and_no_prompt_at_all_are_told_apart(usage_error, monkeypatch):
    pipe("", monkeypatch)
    assert "the prompt is empty" in usage_error("generate", "--backbone", "b")
    terminal = io.StringIO("never read")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "there is no prompt; give --prompt, --prompt-file or a pipe" in usage_error(
        "generate", "--backbone", "b"
    )


def test_a_missing_bank_is_named_before_a_model_is_loaded(tmp_path, usage_error):
    assert f"there is no memory bank in {tmp_path}" in usage_error(
        "generate", "--backbone", "no-such-model", "--bank", tmp_path, "--prompt", "x"
    )


def test_a_bank_of_another_model_is_refused(remembering, tiny_checkpoint, usage_error):
    message = usage_error(
        *("generate", "--backbone", tiny_checkpoint("gpt2"), "--segment-length", 64),
        *("--bank", remembering.bank, "--prompt", "x"),
    )
    assert str(remembering.bank) in message
    assert "identity" in message


def test_chat_without_a_template_is_refused(remembering, usage_error):
    assert "the tokenizer has no chat template; give the prompt without chat" in usage_error(
        "generate", *remembering.model, "--prompt", "x", "--chat"
    )
