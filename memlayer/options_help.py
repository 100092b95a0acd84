"""The docstrings under the fields of an options dataclass, for whoever prints help."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from itertools import pairwise
from typing import Any

from memlayer.errors import PluginError


def field_docs(options_type: type[Any]) -> dict[str, str]:
    """Give the docstring under each field of a dataclass, on one line and without markup.

    Raises:
        PluginError: if a field has none.
    """
    docs: dict[str, str] = {}
    for base in reversed(options_type.__mro__):
        if "__dataclass_fields__" in vars(base):
            docs |= _docs_of(base)
    for field in fields(options_type):
        if field.name not in docs:
            raise PluginError(
                f"field {field.name!r} of {options_type.__name__} has no docstring under it, which "
                "would be its help"
            )
    return docs


def _docs_of(options_type: type[Any]) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(options_type)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for statement, following in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            text = " ".join(following.value.value.split())
            docs[statement.target.id] = text.replace("``", "").replace("`", "")
    return docs
