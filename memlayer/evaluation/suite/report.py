"""From a suite's results to a report: Markdown for people, JSON for programs, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from memlayer.evaluation.results import recovery
from memlayer.evaluation.suite.figures import draw_figures, drawing_problem
from memlayer.files import write_atomically

Results: TypeAlias = Mapping[str, Mapping[str, Any]]

PAPER = (
    "For comparison, the paper (arXiv:2306.07174; a GPT-2-medium-sized backbone, 558M in all, 26B "
    "tokens of training): in-context learning, mean of the five sets with 20 demonstrations and "
    "2,000 in memory, 58.7 to 66.7 % accuracy; ChapterBreak 40.5 % against 18.4 to 28.3 %; SQuAD "
    "with 3 demonstrations 22.28 to 26.77 exact match."
)


def write_report(
    suite: str,
    results: Results,
    output: Path,
    description: Mapping[str, Any],
    gates: Mapping[int, Sequence[float]],
) -> Path:
    """Write ``report.md``, ``report.json`` and ``figures/``; give the first's path.

    Args:
        suite: its name.
        results: ``{"step": ..., "kind": ..., "result": ...}`` by the step's name; of a control by
            ``<step>-control``.
        output: the folder.
        description: of what was evaluated.
        gates: of each memory layer's heads, 0 to 1.
    """
    figures = [] if drawing_problem() else draw_figures(results, output / "figures", gates)
    lines = [
        f"# Suite `{suite}`",
        "",
        *(f"- {name}: {value}" for name, value in description.items()),
        "",
        *_perplexity_lines(results),
        *_task_lines(results),
        PAPER,
        "",
        *_cost_lines(results),
        *_gate_lines(gates),
        *(f"![{path.stem}]({path.relative_to(output)})" for path in figures),
    ]
    if drawing_problem():
        lines.append(f"No figures: {drawing_problem()}")
    content = {
        "suite": suite,
        "description": dict(description),
        "results": dict(results),
        "gates": dict(gates),
    }
    write_atomically(output / "report.json", json.dumps(content, indent=1).encode())
    path = output / "report.md"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def _perplexity_lines(results: Results) -> Iterator[str]:
    found = {
        name: entry["result"]
        for name, entry in results.items()
        if entry["kind"] == "perplexity" and not name.endswith("-control")
    }
    if not found:
        return
    yield "## Perplexity"
    yield ""
    for name, result in found.items():
        control = results.get(f"{name}-control")
        yield f"**{name}**, {result['tokens']:,} tokens, stride {result['stride']}"
        yield ""
        yield "| condition | perplexity | against backbone | gap recovered |"
        yield "| --- | --- | --- | --- |"
        backbone = result["conditions"]["backbone"]["loss"]
        rows = dict(result["conditions"])
        if control is not None:
            rows["trained without memory"] = control["result"]["conditions"]["no_memory"]
        dense = rows.get("dense")
        for condition, score in rows.items():
            recovered = _recovered(score["perplexity"], rows["backbone"], dense, condition)
            change = "" if condition == "backbone" else _percent(score["loss"] - backbone)
            shown = condition.replace("_", " ")
            yield f"| {shown} | {score['perplexity']:.3f} | {change} | {recovered} |"
        yield ""
        yield "| condition | against | change | 95 % interval | over |"
        yield "| --- | --- | --- | --- | --- |"
        for item in result["intervals"]:
            interval = (
                "too few"
                if item["low"] is None
                else f"{_percent(item['low'])} to {_percent(item['high'])}"
            )
            yield (
                f"| {item['condition'].replace('_', ' ')} | {item['against'].replace('_', ' ')} | "
                f"{_percent(item['difference'])} | {interval} | {item['units']} {item['method']} |"
            )
        yield ""


def _recovered(
    perplexity: float, backbone: Mapping[str, Any], dense: Mapping[str, Any] | None, name: str
) -> str:
    if dense is None or name in ("backbone", "dense"):
        return ""
    share = recovery(backbone["perplexity"], perplexity, dense["perplexity"])
    return "" if share is None else f"{100 * share:.0f} %"


def _task_lines(results: Results) -> Iterator[str]:
    found = {name: entry["result"] for name, entry in results.items() if entry["kind"] == "task"}
    if not found:
        return
    yield "## Tasks"
    yield ""
    yield "Mean and standard error over items."
    yield ""
    for name, result in found.items():
        chance = "" if result["chance"] is None else f", chance {result['chance']:.3f}"
        yield f"**{name}**, {result['items']} items{chance}"
        yield ""
        yield "| condition | " + " | ".join(result["metrics"]) + " |"
        yield "| --- |" + " --- |" * len(result["metrics"])
        for condition, scores in result["conditions"].items():
            cells = [
                f"{score['mean']:.3f}"
                + ("" if score["error"] is None else f" ± {score['error']:.3f}")
                for score in scores.values()
            ]
            yield f"| {condition.replace('_', ' ')} | " + " | ".join(cells) + " |"
        yield ""
        yield "| metric | condition | against | difference | 95 % interval |"
        yield "| --- | --- | --- | --- | --- |"
        for item in result["differences"]:
            interval = "" if item["low"] is None else f"{item['low']:+.3f} to {item['high']:+.3f}"
            names = (item["metric"], item["condition"], item["against"])
            shown = " | ".join(part.replace("_", " ") for part in names)
            yield f"| {shown} | {item['difference']:+.3f} | {interval} |"
        yield ""


def _cost_lines(results: Results) -> Iterator[str]:
    for entry in results.values():
        if entry["kind"] != "cost":
            continue
        result = entry["result"]
        machine = result["machine"]
        yield "## Cost of the past"
        yield ""
        yield (
            f"One more segment of {result['segment_length']} tokens, {result['dtype']}, on "
            f"{machine['processor']} ({machine['device']}, {machine['threads']} threads), median "
            f"of {result['rounds']} rounds (lowest to highest); and the bytes that hold the past."
        )
        yield ""
        yield "| tokens of the past | condition | seconds | MiB |"
        yield "| --- | --- | --- | --- |"
        for cost in result["costs"]:
            seconds = cost["seconds"]
            spread = f"({seconds['low']:.3g} to {seconds['high']:.3g})"
            yield (
                f"| {cost['past']:,} | {cost['condition']} | {seconds['median']:.3g} {spread} | "
                f"{cost['bytes'] / 2**20:.1f} |"
            )
        yield ""
        yield from result["notes"]
        if result["notes"]:
            yield ""


def _gate_lines(gates: Mapping[int, Sequence[float]]) -> Iterator[str]:
    if not gates:
        return
    yield "## Gates"
    yield ""
    yield "Share of its attention that each head takes from memory, where it finds any."
    yield ""
    heads = max(len(own) for own in gates.values())
    yield "| memory layer | " + " | ".join(f"head {head}" for head in range(heads)) + " |"
    yield "| --- |" + " --- |" * heads
    for layer, own in gates.items():
        yield f"| {layer} | " + " | ".join(f"{gate:.2f}" for gate in own) + " |"
    yield ""


def _percent(difference: float) -> str:
    """Give a difference of mean losses as the change of perplexity."""
    return f"{100 * math.expm1(difference):+.2f} %"
