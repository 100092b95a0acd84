"""Evaluate: how well a model predicts documents, with and without memory.

    options.py     what to measure
    scoring.py     losses of every scored token, under every condition
    statistics.py  intervals
    perplexity.py  all of it together, for a model and documents in hand
    summary.py     from losses to scores
    results.py     what comes out
    documents.py   beginnings of documents
    run.py         the same for names, as the command line has them
    tasks/         questions whose answers may stand far back

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
    from memlayer.evaluation.tasks.named import evaluate_task_from_names
    from memlayer.evaluation.tasks.options import TaskOptions
    from memlayer.evaluation.tasks.results import TaskResult
    from memlayer.evaluation.tasks.run import evaluate_task
    from memlayer.evaluation.tasks.task import Item, Task

__all__ = [
    "ConditionScore",
    "DocumentScore",
    "Interval",
    "Item",
    "PerplexityOptions",
    "PerplexityResult",
    "PositionScore",
    "Task",
    "TaskOptions",
    "TaskResult",
    "WindowReport",
    "evaluate_perplexity",
    "evaluate_perplexity_from_names",
    "evaluate_task",
    "evaluate_task_from_names",
    "first_tokens",
]

_HOMES = {
    "ConditionScore": "results",
    "DocumentScore": "results",
    "Interval": "statistics",
    "Item": "tasks.task",
    "PerplexityResult": "results",
    "PositionScore": "results",
    "Task": "tasks.task",
    "TaskOptions": "tasks.options",
    "TaskResult": "tasks.results",
    "WindowReport": "results",
    "evaluate_perplexity": "perplexity",
    "evaluate_perplexity_from_names": "run",
    "evaluate_task": "tasks.run",
    "evaluate_task_from_names": "tasks.named",
    "first_tokens": "documents",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
