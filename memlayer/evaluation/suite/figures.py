"""Figures of a suite's report. Needs matplotlib: the extra ``plot``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from memlayer.evaluation.results import recovery

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results: TypeAlias = Mapping[str, Mapping[str, Any]]

COLOURS = {
    "backbone": "#8a8f98",
    "no_memory": "#d1762b",
    "control": "#7a4fa3",
    "foreign_memory": "#c2a13a",
    "knn_lm": "#b0537a",
    "knn_memory": "#5f8f3e",
    "memory": "#0b7a75",
    "dense": "#4c5a73",
}
"""Of the conditions, the same in every figure."""


def drawing_problem() -> str | None:
    """Say why figures cannot be drawn here, with the remedy, or None if they can."""
    if find_spec("matplotlib") is None:
        return 'they need matplotlib: pip install "memlayer-lm[plot]"'
    return None


def draw_figures(
    results: Results, folder: Path, gates: Mapping[int, Sequence[float]]
) -> list[Path]:
    """Draw what the results allow; give the files.

    Args:
        results: ``{"step": ..., "kind": ..., "result": ...}`` by the step's name.
        folder: made if it is not there.
        gates: of each memory layer's heads, 0 to 1.
    """
    scored = {
        name: entry["result"]
        for name, entry in results.items()
        if entry["kind"] == "perplexity" and not name.endswith("-control")
    }
    controls = {
        name.removesuffix("-control"): entry["result"]
        for name, entry in results.items()
        if name.endswith("-control")
    }
    sized = {name: result for name, result in scored.items() if len(_sizes(result)) > 1}
    tasks = {name: entry["result"] for name, entry in results.items() if entry["kind"] == "task"}
    costs = [entry["result"] for entry in results.values() if entry["kind"] == "cost"]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if sized:
        files.append(_draw(folder / "memory_size.png", sized, controls, _by_memory_size))
    if scored:
        files.append(_draw(folder / "local_context.png", scored, controls, _by_local_context))
    dense = {name: result for name, result in scored.items() if "dense" in result["conditions"]}
    if dense:
        files.append(_draw(folder / "recovery.png", dense, controls, _by_recovery))
    if tasks:
        files.append(_draw(folder / "tasks.png", tasks, {}, _by_condition))
    if costs:
        files.append(_draw(folder / "cost.png", _cost_panels(costs[0]), {}, _by_past))
    if gates:
        layers = {f"memory layer {layer}": {"gates": own} for layer, own in gates.items()}
        files.append(_draw(folder / "gates.png", layers, {}, _by_head))
    return files


def _draw(path: Path, results: Results, controls: Results, panel: Any) -> Path:
    # The figure alone, without pyplot: no display, and no global state of the user's touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, result) in zip(axes, results.items(), strict=False):
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        panel(axis, result, controls.get(name))
    for axis in axes[len(results) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _sizes(result: Mapping[str, Any]) -> dict[int, str]:
    return {
        score["memory_size"]: name
        for name, score in sorted(
            result["conditions"].items(), key=lambda item: item[1]["memory_size"]
        )
        if name.startswith("memory_")
    }


def _by_memory_size(
    axis: Axes, result: Mapping[str, Any], control: Mapping[str, Any] | None
) -> None:
    sizes = _sizes(result)
    values = [result["conditions"][name]["perplexity"] for name in sizes.values()]
    axis.plot(list(sizes), values, "o-", color=COLOURS["memory"], label="memory on")
    lines = {name: result["conditions"].get(name) for name in ("backbone", "no_memory")}
    if control is not None:
        lines["control"] = control["conditions"]["no_memory"]
    for name, score in lines.items():
        if score is not None:
            axis.axhline(score["perplexity"], color=COLOURS[name], ls="--", label=_shown(name))
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens in memory, at most")
    axis.set_ylabel("perplexity")
    axis.legend(fontsize=7, frameon=False)


def _by_local_context(
    axis: Axes, result: Mapping[str, Any], control: Mapping[str, Any] | None
) -> None:
    places = [(item["start"] + item["end"]) / 2 for item in result["by_position"]]
    largest = list(_sizes(result).values())[-1:]
    for name in ("no_memory", "foreign_memory", "knn_lm", "knn_memory", *largest, "dense"):
        if name not in result["conditions"]:
            continue
        values = [_change(item["perplexity"], name) for item in result["by_position"]]
        kind = "memory" if name in largest else name
        axis.plot(places, values, "o-", ms=3, color=COLOURS[kind], label=_shown(kind))
    if control is not None:
        values = [_change(item["perplexity"], "no_memory") for item in control["by_position"]]
        axis.plot(places, values, "o-", ms=3, color=COLOURS["control"], label=_shown("control"))
    axis.axhline(0, color=COLOURS["backbone"], lw=0.8)
    axis.set_xlabel("tokens of local context")
    axis.set_ylabel("perplexity against the backbone's, %")
    axis.legend(fontsize=7, frameon=False)


def _by_recovery(axis: Axes, result: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
    """Draw how much of what dense context gains is gained, where the dense context is longer."""
    items = result["by_position"]
    places = [(item["start"] + item["end"]) / 2 for item in items]
    curves = {"no_memory": ("no_memory", items)}
    sizes = _sizes(result)
    if sizes:
        curves["memory"] = (sizes[max(sizes)], items)
    if control is not None:
        curves["control"] = ("no_memory", control["by_position"])
    for kind, (name, own) in curves.items():
        values = [
            _recovered(item["perplexity"], one["perplexity"].get(name))
            for item, one in zip(items, own, strict=True)
        ]
        axis.plot(places, values, "o-", ms=3, color=COLOURS[kind], label=_shown(kind))
    axis.axhline(100, color=COLOURS["dense"], lw=0.8)
    axis.axhline(0, color=COLOURS["backbone"], lw=0.8)
    axis.set_xlabel("tokens of local context")
    axis.set_ylabel("of the gain of dense context, %")
    axis.legend(fontsize=7, frameon=False)


def _recovered(perplexity: Mapping[str, float | None], value: float | None) -> float:
    """Give the share in percent; NaN, which is not drawn, where dense context gains nothing."""
    backbone, dense = perplexity["backbone"], perplexity["dense"]
    if backbone is None or dense is None or value is None:
        return math.nan
    share = recovery(backbone, value, dense)
    return math.nan if share is None else 100 * share


def _change(perplexity: Mapping[str, float | None], name: str) -> float:
    """Give the change against the backbone in percent; NaN, which is not drawn, without tokens."""
    value, backbone = perplexity[name], perplexity["backbone"]
    return math.nan if value is None or backbone is None else 100 * (value / backbone - 1)


def _by_condition(axis: Axes, result: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
    metric = result["metrics"][0]
    names = list(result["conditions"])
    scores = [result["conditions"][name][metric] for name in names]
    axis.bar(
        range(len(names)),
        [score["mean"] for score in scores],
        yerr=[score["error"] or 0.0 for score in scores],
        color=[COLOURS[name] for name in names],
        width=0.7,
        capsize=3,
    )
    if result["chance"] is not None:
        axis.axhline(result["chance"], color="black", lw=0.8, ls=":")
    axis.set_xticks(range(len(names)), [_shown(name) for name in names], rotation=20, fontsize=7)
    if metric != "loss":
        axis.set_ylim(0, 1)
    axis.set_ylabel(metric.replace("_", " "))


def _cost_panels(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give one panel of seconds and one of bytes: a curve ``(pasts, values)`` a condition."""
    panels: dict[str, dict[str, Any]] = {
        f"time of {result['segment_length']} more tokens": {"unit": "seconds", "curves": {}},
        "what holds the past": {"unit": "MiB", "curves": {}},
    }
    for cost in result["costs"]:
        values = (cost["seconds"]["median"], cost["bytes"] / 2**20)
        for panel, value in zip(panels.values(), values, strict=True):
            if value:
                pasts, held = panel["curves"].setdefault(cost["condition"], ([], []))
                pasts.append(cost["past"])
                held.append(value)
    return panels


def _by_past(axis: Axes, result: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
    for name, (pasts, values) in result["curves"].items():
        axis.plot(pasts, values, "o-", ms=3, color=COLOURS[name], label=_shown(name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens of the past")
    axis.set_ylabel(result["unit"])
    axis.legend(fontsize=7, frameon=False)


def _by_head(axis: Axes, result: Mapping[str, Any], control: Mapping[str, Any] | None) -> None:
    gates = result["gates"]
    axis.bar(range(len(gates)), gates, color=COLOURS["memory"], width=0.7)
    axis.set_xticks(range(len(gates)))
    axis.set_ylim(0, 1)
    axis.set_xlabel("head")
    axis.set_ylabel("share from memory")


def _shown(name: str) -> str:
    return {
        "no_memory": "memory off",
        "memory": "memory on",
        "foreign_memory": "another's memory",
        "control": "trained without memory",
        "knn_lm": "kNN-LM",
        "knn_memory": "memory and kNN-LM",
    }.get(name, name)
