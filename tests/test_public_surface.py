from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import memlayer


def test_all_is_sorted_and_without_repetition():
    assert memlayer.__all__ == sorted(set(memlayer.__all__))


@pytest.mark.parametrize("name", memlayer.__all__)
def test_every_public_name_resolves(name):
    assert getattr(memlayer, name) is not None


def test_type_checkers_and_users_see_the_same_names():
    tree = ast.parse(Path(memlayer.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    declared = {
        (alias.name, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == {
        (name, f"memlayer.{module}") for name, module in memlayer._MODULE_OF.items()
    }
    assert {name for name, _ in declared} | {"__version__"} == set(memlayer.__all__)


def test_every_exception_is_public():
    from memlayer import errors

    tree = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert tree <= set(memlayer.__all__)


def test_dir_lists_every_public_name():
    assert set(memlayer.__all__) <= set(dir(memlayer))


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'memlayer' has no attribute 'warp'"):
        _ = memlayer.warp


def test_the_version_is_the_installed_distributions():
    assert memlayer.__version__ == version("memlayer-lm")


def test_importing_memlayer_imports_nothing_heavy():
    code = (
        "import sys, memlayer; memlayer.LongMemConfig(); memlayer.hookimpl; memlayer.MemlayerError;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'faiss', 'hnswlib', 'typer', 'rich') "
        "if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
