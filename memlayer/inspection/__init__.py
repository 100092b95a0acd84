"""Look inside: what each token of a text retrieved, from which passages, and what that changed.

    recording.py  a memory reader that notes what every layer retrieves
    passages.py   from chunk numbers to text, with the document and the place
    text.py       the place of every token in a text
    prompt.py     all of it together, for a model and a prompt in hand
    options.py    how much is kept
    results.py    what comes out
    page.py       the same as one HTML page

Nothing here is imported before it is asked for: importing this package must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlayer.inspection.options import InspectionOptions

if TYPE_CHECKING:
    from memlayer.inspection.page import render_page, write_page
    from memlayer.inspection.prompt import inspect_completion, inspect_prompt, inspect_tokens
    from memlayer.inspection.recording import record_reads
    from memlayer.inspection.results import (
        DocumentReading,
        HeadRead,
        HeadReading,
        Inspection,
        MemoryState,
        Passage,
        Prediction,
        Read,
        TokenReading,
    )

__all__ = [
    "DocumentReading",
    "HeadRead",
    "HeadReading",
    "Inspection",
    "InspectionOptions",
    "MemoryState",
    "Passage",
    "Prediction",
    "Read",
    "TokenReading",
    "inspect_completion",
    "inspect_prompt",
    "inspect_tokens",
    "record_reads",
    "render_page",
    "write_page",
]

_HOMES = {
    "inspect_completion": "prompt",
    "inspect_prompt": "prompt",
    "inspect_tokens": "prompt",
    "render_page": "page",
    "write_page": "page",
    "record_reads": "recording",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "results")
    return getattr(import_module(f"{__name__}.{home}"), name)
