"""`memlayer convert`: from a released file to what every other command takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import memlayer
from memlayer_cli.main import run


@pytest.fixture
def checkpoint(shared: Path, tmp_path: Path) -> Path:
    """Write one of the random-weight state dicts, as the released code names its tensors."""
    with safe_open(shared / "reference" / "model.safetensors", "pt") as file:
        prefix = "b.weight."
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        state = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    save_file(state, tmp_path / "released.safetensors")
    return tmp_path / "released.safetensors"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    folder = tmp_path / "bpe"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz.,\u0120\u010a"
    own = {letter: number for number, letter in enumerate(letters)}
    (folder / "encoder.json").write_text(json.dumps(own), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "dict.txt").write_text("".join(f"{number} 1\n" for number in own.values()))
    return folder


def test_a_converted_model_reads_text(
    checkpoint: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "longmem"
    options = ["--output", str(output), "--vocabulary", str(vocabulary), "--segment-length", "16"]
    options += ["--top-k", "8", "--chunk-size", "4", "--memory-size", "64"]
    assert run(["convert", "longmem", str(checkpoint), *options]) == 0
    captured = capsys.readouterr()
    model = memlayer.load(output)
    sizes = [
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model.backbone, model.side_network)
    ]
    assert captured.out == (
        f"{output}: a backbone of {sizes[0]:,} weights and a side network of {sizes[1]:,}; memory "
        "is read from layer 3, 8 tokens in chunks of 4\n"
    )
    assert captured.err == ""
    text = tmp_path / "mill.txt"
    text.write_text("the mill is closed. bring the long rope, ada. " * 3)
    bank = ["--checkpoint", str(output), "--bank", str(tmp_path / "mill.bank")]
    assert run(["memorize", *bank, str(text)]) == 0
    assert run(["generate", *bank, "--max-new-tokens", "4", "--prompt", "the mill"]) == 0
    assert (
        run(
            [
                "eval",
                "perplexity",
                "--checkpoint",
                str(output),
                "--data",
                str(text),
                "--split",
                "all",
            ]
        )
        == 0
    )
    assert model.memory_config.normed_residual


def test_what_is_missing_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(tmp_path / "longmem")]
    assert run(["convert", "longmem", str(checkpoint), *options]) == 0
    assert "it has no tokenizer: give --vocabulary to use it on text" in capsys.readouterr().out
    assert run(["convert", "longmem", str(tmp_path / "none.pt"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"memlayer: error: cannot read {tmp_path / 'none.pt'} (")
    assert error.count("\n") == 1
