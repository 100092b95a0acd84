from __future__ import annotations

import inspect as signatures
import json
import signal
import subprocess
import sys
import time

import pytest

from memlayer.ingestion import memorize_documents
from memlayer.ingestion.run import memorize_from_names
from memlayer.memory import bank_exists, bank_info, verify_bank
from memlayer_cli.main import run
from memlayer_cli.memorize import SAVE_EVERY

MILL = "The mill is closed. Bring the long rope, Ada. "


@pytest.fixture
def novels(tmp_path):
    """Give a folder of two texts."""
    folder = tmp_path / "novels"
    folder.mkdir()
    (folder / "mill.txt").write_text(MILL * 5, encoding="utf-8")
    (folder / "ship.txt").write_text("A ship came in at dawn. " * 3, encoding="utf-8")
    return folder


@pytest.fixture
def memorize(remembering, tmp_path, capsys):
    """Run the command with the tiny checkpoint, and give what it wrote to standard output."""

    def call(*arguments):
        capsys.readouterr()
        place = ["--checkpoint", remembering.checkpoint, "--bank", tmp_path / "bank"]
        assert run(["memorize", *map(str, [*place, *arguments])]) == 0
        return capsys.readouterr().out

    return call


def test_a_folder_of_documents_becomes_a_bank(novels, memorize, tmp_path):
    found = json.loads(memorize(novels, "--json", "-"))
    assert [(item["name"], item["outcome"]) for item in found["documents"]] == [
        ("mill.txt", "new"),
        ("ship.txt", "new"),
    ]
    # One token a byte.
    assert [item["tokens"] for item in found["documents"]] == [230, 72]
    assert verify_bank(tmp_path / "bank").whole
    info = bank_info(tmp_path / "bank")
    assert (info.lengths, info.capacity) == ((256,), 256)
    assert all(document.complete for document in info.documents)


def test_what_is_held_is_not_read_again(novels, memorize):
    memorize(novels / "mill.txt")
    shown = memorize(novels)
    assert "held already" in shown
    assert "new: read" in shown
    assert "read 72 tokens" in shown
    found = json.loads(memorize(novels, "--json", "-"))
    assert [item["outcome"] for item in found["documents"]] == ["held", "held"]


def test_a_bank_keeps_its_size_until_told_otherwise(novels, memorize, tmp_path):
    memorize(novels / "mill.txt", "--memory-size", 64)
    memorize(novels / "ship.txt")
    assert bank_info(tmp_path / "bank").capacity == 64


def test_a_backbone_alone_writes_the_layers_it_is_given(remembering, novels, tmp_path, capsys):
    place = ["--backbone", remembering.backbone, "--bank", tmp_path / "bank"]
    options = ["--memory-layer", 0, "--memory-layer", 3, "--segment-length", 64]
    command = ["memorize", *place, *options, novels / "mill.txt"]
    assert run([str(word) for word in command]) == 0
    assert "layers [0, 3]" in bank_info(tmp_path / "bank").identity
    # Once it exists, the bank says which layers; nobody has to.
    command = ["memorize", *place, "--segment-length", 64, novels / "ship.txt"]
    assert run([str(word) for word in command]) == 0
    assert len(bank_info(tmp_path / "bank").documents) == 2


def test_ctrl_c_leaves_a_whole_bank_and_the_same_command_goes_on(remembering, tmp_path, memorize):
    long = tmp_path / "long.txt"
    long.write_text(MILL * 300, encoding="utf-8")
    command = ["memorize", "--checkpoint", str(remembering.checkpoint)]
    command += ["--bank", str(tmp_path / "bank"), str(long), "--save-every", "1"]
    code = "from memlayer_cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not bank_exists(tmp_path / "bank") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "memlayer: interrupted"
    report = verify_bank(tmp_path / "bank")
    assert report.whole
    (document,) = report.info.documents
    assert not document.complete
    assert 0 < document.tokens < len(MILL) * 300
    shown = memorize(long, "--save-every", 500)
    assert f"continued from token {document.tokens:,}" in shown


def test_the_saving_default_is_the_librarys():
    for function in (memorize_documents, memorize_from_names):
        assert signatures.signature(function).parameters["save_every"].default == SAVE_EVERY


def test_wrong_command_lines_are_one_clear_line(
    remembering, novels, tmp_path, usage_error, memorize
):
    place = ("--bank", tmp_path / "bank")
    model = ("--checkpoint", remembering.checkpoint)
    mill = novels / "mill.txt"
    assert "give either --checkpoint or --backbone" in usage_error("memorize", *place, mill)
    assert "Missing option '--bank'" in usage_error("memorize", *model, mill)
    assert "Missing argument 'FILE...'" in usage_error("memorize", *model, *place)
    assert "save_every must be at least 1 segment, got 0" in usage_error(
        "memorize", *model, *place, mill, "--save-every", 0
    )
    assert "memory_layers is fixed by the checkpoint" in usage_error(
        "memorize", *model, *place, mill, "--memory-layer", 1
    )
    assert "there is no file or folder" in usage_error(
        "memorize", *model, *place, novels / "absent.txt"
    )
    assert not bank_exists(tmp_path / "bank")
    memorize(mill)
    mill.write_text("another text", encoding="utf-8")
    assert "holds another text by the name 'mill.txt'" in usage_error(
        "memorize", *model, *place, mill
    )
    message = usage_error(
        *("memorize", "--backbone", remembering.backbone, "--memory-layer", 1, *place),
        novels / "ship.txt",
    )
    assert "layers [1]" in message
