"""An inspection as one HTML page that needs nothing else: no network, no other file.

The template `page.html` holds style and script; the data goes into it as JSON. The script makes
text nodes of it and never markup, so what a document says is shown and not run. A policy in the
page's head forbids every request.
"""

from __future__ import annotations

import html
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memlayer
from memlayer.errors import DataError
from memlayer.files import write_atomically

if TYPE_CHECKING:
    from memlayer.inspection.results import Inspection, Passage, Read

_TITLE_CHARACTERS = 60
_DIGITS = 5
_PLACEHOLDERS = re.compile(r"\{\{(?:title|data)\}\}")
# JSON is also safe inside <script> once none of these is in it as itself.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def render_page(inspection: Inspection) -> str:
    """Give the page as text."""
    data = json.dumps(_page_data(inspection), ensure_ascii=False, allow_nan=False)
    template = files("memlayer.inspection").joinpath("page.html").read_text(encoding="utf-8")
    before_title, before_data, rest = _PLACEHOLDERS.split(template)
    title = html.escape(_title(inspection))
    return "".join([before_title, title, before_data, data.translate(_ESCAPES), rest])


def write_page(inspection: Inspection, path: str | Path) -> None:
    """Write the page into a file, all or nothing.

    Raises:
        DataError: if the file cannot be written there.
    """
    check_page_path(path)
    try:
        write_atomically(Path(path), render_page(inspection).encode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def check_page_path(path: str | Path) -> None:
    """Find out before the work whether its page has a place.

    Raises:
        DataError: if the path is a folder, or in no folder.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder, not a file; give the page a name in it")
    if not os.path.isdir(path.parent):
        raise DataError(f"there is no folder {path.parent} for the page; make it first")


def _title(inspection: Inspection) -> str:
    text = "".join(token.text for token in inspection.tokens[: inspection.prompt_tokens])
    text = " ".join(text.split())
    if len(text) > _TITLE_CHARACTERS:
        text = text[: _TITLE_CHARACTERS - 1].rstrip() + "…"
    return f"{text} · memlayer inspect"


def _page_data(inspection: Inspection) -> dict[str, Any]:
    """Give what the page shows; long lists as arrays instead of objects, numbers rounded."""
    whole = inspection.to_dict()
    tokens = [
        {
            **{name: value for name, value in item.items() if name != "places"},
            "reads": [_short_read(read) for read in token.reads],
            "places": [round(share, _DIGITS) for share in token.places],
        }
        for item, token in zip(whole["tokens"], inspection.tokens, strict=True)
    ]
    data = {
        **whole,
        "version": memlayer.__version__,
        "tokens": tokens,
        "chunks": {passage.chunks[0]: _short_passage(passage) for passage in inspection.chunks},
    }
    rounded: dict[str, Any] = _rounded(data)
    return rounded


def _short_read(read: Read) -> list[Any]:
    heads = [[item.layer, item.head, item.score, item.contribution] for item in read.heads]
    return [read.chunk, read.weight, heads]


def _short_passage(passage: Passage) -> dict[str, Any]:
    names = ("document", "offset", "distance", "text", "marks", "readers")
    return {name: getattr(passage, name) for name in names}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
