"""Evaluate: how well a model predicts documents, with and without memory.

    options.py     what to measure
    windows.py     which tokens each forward reads and scores
    scoring.py     losses of every scored token, under every condition
    statistics.py  intervals
    perplexity.py  all of it together, for a model and documents in hand
    summary.py     from losses to scores
    results.py     what comes out
    documents.py   beginnings of documents
    run.py         the same for names, as the command line has them

Nothing here is imported before it is asked for: importing this package must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlayer.evaluation.options import PerplexityOptions

if TYPE_CHECKING:
    from memlayer.evaluation.documents import first_tokens
    from memlayer.evaluation.perplexity import evaluate_perplexity
    from memlayer.evaluation.results import (
        ConditionScore,
        DocumentScore,
        PerplexityResult,
        PositionScore,
        WindowReport,
    )
    from memlayer.evaluation.run import evaluate_perplexity_from_names
    from memlayer.evaluation.statistics import Interval

__all__ = [
    "ConditionScore",
    "DocumentScore",
    "Interval",
    "PerplexityOptions",
    "PerplexityResult",
    "PositionScore",
    "WindowReport",
    "evaluate_perplexity",
    "evaluate_perplexity_from_names",
    "first_tokens",
]

_HOMES = {
    "ConditionScore": "results",
    "DocumentScore": "results",
    "Interval": "statistics",
    "PerplexityResult": "results",
    "PositionScore": "results",
    "WindowReport": "results",
    "evaluate_perplexity": "perplexity",
    "evaluate_perplexity_from_names": "run",
    "first_tokens": "documents",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
