from __future__ import annotations

import json
import shutil

import pytest

from memlayer.memory import bank_info
from memlayer_cli.main import run


@pytest.fixture
def damaged(remembering, tmp_path):
    """Give a copy of the bank with one byte changed, and the changed file."""
    copy = tmp_path / "bank"
    shutil.copytree(remembering.bank, copy)
    shard = next(copy.glob("shard-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return copy, shard


def test_info_says_what_the_bank_holds(remembering, capsys):
    assert run(["bank", "info", str(remembering.bank)]) == 0
    shown = capsys.readouterr().out
    assert "holds: 138 of 256 tokens, in chunks of 4" in shown
    assert "layers [2], float32" in shown
    assert "mill.txt" in shown
    assert "138" in shown


def test_info_as_json_is_the_librarys(remembering, capsys):
    assert run(["bank", "info", str(remembering.bank), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(bank_info(remembering.bank).to_dict()))


def test_a_whole_bank_verifies(remembering, capsys):
    assert run(["bank", "verify", str(remembering.bank)]) == 0
    assert capsys.readouterr().out.startswith("whole: 2 files, ")


def test_a_damaged_bank_is_exit_1_with_each_problem(damaged, capsys):
    bank, shard = damaged
    (bank / "state-1").touch()
    assert run(["bank", "verify", str(bank)]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("damaged: ")
    assert shard.name in shown.out
    assert shown.err == ""
    assert run(["bank", "verify", str(bank), "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] is False
    (problem,) = found["problems"]
    assert shard.name in problem


def test_no_bank_is_the_users_mistake_for_info_and_damage_for_verify(tmp_path, capsys, usage_error):
    assert f"there is no memory bank in {tmp_path}" in usage_error("bank", "info", tmp_path)
    assert run(["bank", "verify", str(tmp_path)]) == 1
    assert f"there is no memory bank in {tmp_path}" in capsys.readouterr().out
