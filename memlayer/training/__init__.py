"""Adapt a wrapped backbone to read its memory.

    documents ──► StreamBatches ──► model(update_memory=True) ──► cross entropy ──► AdamW
                       │                      │                        │
                  row b: the next        row b's memory,          log.jsonl, curves.png,
                  segment of its         cleared at its           checkpoints/step-000100/
                  document               document's end

`train` does it for a model in hand, `train_from_names` for names, as the command line has them.
Nothing here is imported before it is asked for: importing this package must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memlayer.training.options import TrainingOptions

if TYPE_CHECKING:
    from memlayer.training.evaluation import Perplexities
    from memlayer.training.log import read_log
    from memlayer.training.loop import Trainer, train
    from memlayer.training.plot import plot_curves
    from memlayer.training.results import TrainingResult
    from memlayer.training.run import train_from_names

__all__ = [
    "Perplexities",
    "Trainer",
    "TrainingOptions",
    "TrainingResult",
    "plot_curves",
    "read_log",
    "train",
    "train_from_names",
]

_HOMES = {
    "Perplexities": "evaluation",
    "Trainer": "loop",
    "TrainingResult": "results",
    "plot_curves": "plot",
    "read_log": "log",
    "train": "loop",
    "train_from_names": "run",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
