"""What a finished training run left."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlayer.training.evaluation import Perplexities


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training run left."""

    output: Path
    """The directory that `memlayer.load` reads."""

    log: Path
    """One JSON object a line: every step and every evaluation."""

    plot: Path | None
    """The curves; None where matplotlib is missing."""

    steps: int
    """Optimiser steps of the whole run, those before a resume included."""

    tokens: int
    """Tokens read in these steps, padding not counted."""

    seconds: float
    """Spent in the steps, evaluations and checkpoints not counted."""

    perplexities: Perplexities | None
    """After the last step; None without validation documents."""

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]
