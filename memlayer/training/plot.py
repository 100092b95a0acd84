"""The curves of a training run as a picture. Needs matplotlib: the extra ``plot``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayer.training.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_NAME = "curves.png"

_LOSS = "#4c5a73"
_MEMORY_ON = "#0b7a75"
_MEMORY_OFF = "#d1762b"
_BACKBONE = "#8a8f98"


def plotting_problem() -> str | None:
    """Say why curves cannot be drawn here, with the remedy, or None if they can."""
    if find_spec("matplotlib") is None:
        return 'the curves need matplotlib: pip install "memlayer-lm[plot]"'
    return None


def plot_curves(run: Path | str, file: Path | str | None = None) -> Path:
    """Draw training loss and validation perplexity against tokens, from a run's log.

    Args:
        run: the directory of a training run, or its log.
        file: where the picture goes, by default ``curves.png`` beside the log. Its ending says
            the format, as matplotlib knows them.

    Returns:
        Where the picture is.

    Raises:
        ImportError: if matplotlib is missing; the message says how to install it.
        CheckpointError: if the log is damaged.
    """
    problem = plotting_problem()
    if problem is not None:
        raise ImportError(problem)
    # The figure alone, without pyplot: no display, and no global state of the user's touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = Path(run)
    file = (run if run.is_dir() else run.parent) / PLOT_NAME if file is None else Path(file)
    entries = read_log(run)
    steps = [entry for entry in entries if entry["kind"] == "step"]
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation"]

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, perplexity_axes = figure.subplots(1, 2)
    _draw_loss(loss_axes, steps)
    _draw_perplexity(perplexity_axes, evaluations)
    for axes in (loss_axes, perplexity_axes):
        _style(axes)
    figure.savefig(file, dpi=150)
    return file


def _draw_loss(axes: Axes, steps: Sequence[dict[str, Any]]) -> None:
    tokens = [entry["tokens"] for entry in steps]
    losses = [entry["loss"] for entry in steps]
    axes.plot(tokens, losses, color=_LOSS, alpha=0.3, linewidth=1, label="each step")
    axes.plot(tokens, _smooth(losses), color=_LOSS, linewidth=2, label="running mean")
    axes.set_title("Training loss")
    axes.set_ylabel("cross entropy, nats per token")
    if steps:
        axes.legend(frameon=False)


def _draw_perplexity(axes: Axes, evaluations: Sequence[dict[str, Any]]) -> None:
    tokens = [entry["tokens"] for entry in evaluations]
    axes.set_title("Validation perplexity")
    axes.set_ylabel("perplexity")
    if not evaluations:
        axes.text(0.5, 0.5, "no validation documents", ha="center", transform=axes.transAxes)
        return
    for key, label, color in (
        ("perplexity_memory_off", "memory off", _MEMORY_OFF),
        ("perplexity_memory_on", "memory on", _MEMORY_ON),
    ):
        values = [entry[key] for entry in evaluations]
        axes.plot(tokens, values, color=color, linewidth=2, marker="o", markersize=4, label=label)
    backbone = evaluations[0]["perplexity_backbone"]
    axes.axhline(backbone, color=_BACKBONE, linestyle="--", linewidth=1.5, label="backbone alone")
    axes.legend(frameon=False)


def _style(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("training tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="#e3e5e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontweight("bold")
    axes.title.set_horizontalalignment("center")


def _smooth(values: Sequence[float]) -> list[float]:
    """Average exponentially, over about the last 5 % of all values, without the pull of a start."""
    keep = math.exp(-1 / max(1.0, 0.05 * len(values)))
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
