"""The ``--json`` option, the same for every command: machine-readable results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

STANDARD_OUTPUT = "-"


def _check(destination: str | None) -> str | None:
    # Before the work, not after it: a result of an hour's evaluation must find its place.
    if destination not in (None, STANDARD_OUTPUT):
        path = Path(destination)
        if path.is_dir():
            raise typer.BadParameter(f"{destination!r} is a folder, not a file")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"{destination!r} is in no existing folder; make it first")
    return destination


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=_check,
        help="Write the results as JSON to FILE, or with - to standard output and nothing else.",
    ),
]
"""Annotation of a command's ``json`` parameter; its value goes to `write_json`."""


def write_json(results: Any, destination: str) -> None:
    """Write results to a file, all or nothing, or to standard output for ``-``.

    Args:
        results: JSON types only. NaN and infinity are refused, since JSON has none.
        destination: the value of the option.
    """
    text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if destination == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    path = Path(destination)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
