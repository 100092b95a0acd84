"""The example plug-in, installed by pip and used as any third party's is."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin-usearch"

pytest.importorskip("usearch")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the example from a copy, so that building leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    target = ["--target", str(folder / "site"), str(folder / "source")]
    run(folder, "-m", "pip", "install", *options, *target)
    # A package of its own: what its tests find is the installed one.
    shutil.rmtree(folder / "source" / "memlayer_usearch")
    return folder


def run(folder: Path, *arguments: str) -> str:
    """Run Python where the plug-in is installed, and give what it printed."""
    places = [str(folder / "site"), *filter(None, sys.path)]
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def memlayer_command(folder: Path, *arguments: str) -> str:
    return run(folder, "-c", "from memlayer_cli.main import main; main()", *arguments)


def test_it_is_found_once_it_is_installed(installed):
    listed = json.loads(memlayer_command(installed, "plugins", "--json", "-"))
    (backend,) = [row for row in listed["plugins"] if row["name"] == "usearch"]
    assert backend["kind"] == "backend"
    assert backend["available"]
    assert backend["distribution"] == "memlayer-usearch"
    assert listed["failures"] == []


def test_it_passes_the_conformance_suite(installed):
    output = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "source/tests")
    assert int(re.search(r"(\d+) passed", output)[1]) > 200
    assert "skipped" not in output


def test_an_evaluation_uses_it(installed, remembering, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The mill is closed. Bring the long rope, Ada. " * 40)
    arguments = ["--checkpoint", str(remembering.checkpoint), "--data", str(text), "--split", "all"]
    command = ["eval", "perplexity", *arguments, "--backend", "usearch", "--json", "-"]
    result = json.loads(memlayer_command(installed, *command))
    assert result["backend"] == "usearch"
    assert result["memory_tokens"] == 256
    assert result["perplexity"] > 1


def test_it_is_less_than_a_hundred_lines_of_code():
    lines = 0
    for path in (EXAMPLE / "memlayer_usearch").glob("*.py"):
        code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines += sum(bool(line.split("#")[0].strip()) for line in code.splitlines())
    assert 50 < lines < 100
