"""What a run logs, sent to trackers too: TensorBoard, Weights & Biases, what accelerate knows.

    log entry {"kind": "step", "loss": ...} ──► train/loss, ...        at that step
              {"kind": "evaluation", ...}   ──► validation/..., ...
    settings of training.json               ──► the tracker's hyperparameters, once

The log file is written in any case; trackers get the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memlayer.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "memlayer"
_PREFIXES = {"step": "train", "evaluation": "validation"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate would leave out in silence.

    Raises:
        ConfigError: if accelerate knows no such tracker.
        BackendUnavailableError: if its package is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"report_to must be among {known}, got {name!r:.80}")
        if name not in available:
            raise BackendUnavailableError(
                f"report_to {name!r} needs its package: pip install {name.replace('_', '-')}"
            )


class Trackers:
    """Passes a run's log on.

    Args:
        accelerator: made with ``log_with`` and the run's directory.
        settings: of the run, in groups: ``{"options": {"steps": 500, ...}, ...}``.
    """

    def __init__(self, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        if accelerator.log_with:
            accelerator.init_trackers(PROJECT, config=_flat(settings))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Pass one entry of the log on."""
        prefix = _PREFIXES[entry["kind"]]
        numbers = {
            f"{prefix}/{name}": value
            for name, value in entry.items()
            if name not in ("kind", "step")
        }
        self._accelerator.log(numbers, step=entry["step"])

    def close(self) -> None:
        """Let trackers finish what they are writing."""
        for tracker in self._accelerator.trackers:  # its end_training() also ends the processes
            tracker.finish()


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Join groups and names; trackers take numbers, text and truth values only."""
    return {
        f"{group}/{name}": value if isinstance(value, (bool, int, float, str)) else str(value)
        for group, values in settings.items()
        for name, value in values.items()
    }
