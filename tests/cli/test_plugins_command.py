from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import memlayer
from memlayer import hookimpl
from memlayer.plugins import load_plugins
from memlayer.registry import Source
from memlayer_cli.main import run

if TYPE_CHECKING:
    from memlayer.hookspecs import Register
    from memlayer.plugins import Plugins


class Search:
    @hookimpl
    def register_backends(self, register: Register) -> None:
        register("present", "collections:OrderedDict")
        register("absent", "search:Absent", extra="fast", requires=("no_such_library",))
        register("Wrong", "collections:OrderedDict")

    @hookimpl
    def register_adapters(self, register: Register) -> None:
        register("family", "collections:Counter", model_types=("family",))


INSTALL = 'pip install "search-lib[fast]"'
ABSENT = "needs the Python package no_such_library, which is not installed: " + INSTALL


@pytest.fixture
def plugins() -> Plugins:
    loaded = load_plugins(entry_points=False)
    loaded.add(Search(), Source(plugin="search", distribution="search-lib", version="3.0"))
    return loaded


def test_json_says_what_is_there_from_where_and_why_not(plugins, capsys):
    assert run(["plugins", "--json", "-"], plugins) == 0
    found = json.loads(capsys.readouterr().out)
    common = {"distribution": "search-lib", "version": "3.0"}
    here = {"available": True, "reason": None, "install": None}
    gone = {"available": False, "reason": ABSENT, "install": INSTALL}
    assert found["plugins"][:3] == [
        {"kind": "backend", "name": "absent", **common, **gone},
        {"kind": "backend", "name": "present", **common, **here},
        {"kind": "adapter", "name": "family", **common, **here},
    ]
    own = {"distribution": "memlayer-lm", "version": memlayer.__version__}
    assert {"kind": "command", "name": "plugins", **own, **here} in found["plugins"]
    assert found["failures"] == [
        {
            "plugin": "search",
            "distribution": "search-lib",
            "reason": "a name has lower-case letters, digits, - and _ only, got 'Wrong'",
        }
    ]


def test_json_goes_to_a_file_beside_the_table(plugins, capsys, tmp_path):
    assert run(["plugins", "--json", str(tmp_path / "found.json")], plugins) == 0
    assert "present" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    assert json.loads((tmp_path / "found.json").read_text())["plugins"][0]["name"] == "absent"


def test_the_table_gives_install_commands_in_one_piece(plugins, capsys):
    assert run(["plugins"], plugins) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("present" in line and "search-lib 3.0" in line for line in lines)
    assert f"unavailable: backend absent: {ABSENT}" in lines
    assert (
        "failed: search of search-lib: a name has lower-case letters, digits, - and _ only, "
        "got 'Wrong'"
    ) in lines


def test_the_installed_plugins_are_listed(capsys):
    assert run(["plugins", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failures"] == []
    listed = {(row["kind"], row["name"]) for row in found["plugins"]}
    assert {("backend", "torch"), ("adapter", "llama"), ("command", "train")} <= listed
    for row in found["plugins"]:
        assert row["available"] or row["reason"]
