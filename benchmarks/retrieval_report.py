"""The table and the figure of ``retrieval.py``, from its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# One hue per engine; yardsticks are grey.
COLOURS = ["#0b7a75", "#d1762b", "#7a4fa3", "#b03a48", "#2f6db5", "#8a6d1d"]
YARDSTICKS = {"floor": ":", "paper": "--", "loop of torch products": "--"}


def write_report(folder: Path) -> None:
    """Print the table, and write it and the figure beside the records.

    A size that was measured more than once is shown as it was the last time.
    """
    lines = (folder / "retrieval.jsonl").read_text(encoding="utf-8").splitlines()
    latest: dict[tuple[Any, ...], Record] = {}
    for line in lines:
        record = json.loads(line)
        latest[record["device"], record["tokens"], record["queries"], record["side"]] = record
    records = list(latest.values())
    table = tables(records)
    print(table)
    (folder / "retrieval.md").write_text(table, encoding="utf-8")
    draw(records, folder / "retrieval.png")


def tables(records: list[Record]) -> str:
    """Give Markdown: a table of searches per number of queries, and one of writes."""
    sides = list(dict.fromkeys(record["side"] for record in records))
    parts = []
    for queries in sorted({record["queries"] for record in records}):
        some = [record for record in records if record["queries"] == queries]
        parts.append(
            f"{queries:,} {'query' if queries == 1 else 'queries'} a lane: milliseconds, "
            "(times the paper's; quartiles), recall where it is below 1\n\n"
            + _table(sides, some, _search_cell)
        )
    some = [record for record in records if record["queries"] == records[0]["queries"]]
    parts.append(
        "Microseconds per vector: filling it; appending to a full one that drops its oldest\n\n"
        + _table(sides, some, _write_cell)
    )
    notes = {
        f"{name} at {record['tokens']:,} tokens: {reason}"
        for record in records
        for name, reason in record["notes"].items()
    }
    if notes:
        parts.append("Left out: " + "; ".join(sorted(notes)))
    devices = {(record["device"], record["threads"]) for record in records}
    parts += [f"On {name}, {threads} threads." for name, threads in sorted(devices)]
    return "\n\n".join(parts) + "\n"


def _table(sides: list[str], records: list[Record], cell: Any) -> str:
    rows = ["| tokens (vectors x lanes) | " + " | ".join(sides) + " |"]
    rows.append("|---" * (len(sides) + 1) + "|")
    for tokens in sorted({record["tokens"] for record in records}):
        here = {record["side"]: record for record in records if record["tokens"] == tokens}
        one = next(iter(here.values()))
        cells = [cell(here[side]) if side in here else "" for side in sides]
        size = f"{tokens:,} ({one['vectors']:,} x {one['lanes']})"
        rows.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _search_cell(record: Record) -> str:
    text = f"{1e3 * record['seconds']:.3g}"
    if record["side"] not in ("floor", "paper"):
        middle, low, high = record["against_paper"]
        text += f" ({middle:.2f}; {low:.2f} to {high:.2f})"
    if record["recall"] is not None and record["recall"] < 0.9999:
        text += f" r {record['recall']:.3f}"
    return text


def _write_cell(record: Record) -> str:
    build = "" if not record["build"] else f"{1e6 * record['build']:.3g}"
    append = record.get("append")
    return build if append is None else f"{build}; {1e6 * append:.3g}"


def draw(records: list[Record], file: Path) -> None:
    """Draw time against stored tokens, a panel per number of queries, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    counts = sorted({record["queries"] for record in records})
    sides = list(dict.fromkeys(record["side"] for record in records))
    engines = [side for side in sides if side not in YARDSTICKS]
    colours = dict(zip(engines, COLOURS * len(engines), strict=False))
    figure = Figure(figsize=(4.1 * len(counts), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for panel, queries in zip(panels, counts, strict=True):
        for side in sides:
            points = sorted(
                (
                    record["tokens"],
                    1e6 * record["seconds"] / (record["queries"] * record["lanes"]),
                )
                for record in records
                if (record["queries"], record["side"]) == (queries, side)
            )
            panel.plot(
                *zip(*points, strict=True),
                label=side,
                color=colours.get(side, "#8a8f98"),
                linestyle=YARDSTICKS.get(side, "-"),
                marker="" if side in YARDSTICKS else "o",
                markersize=4,
            )
        panel.set(xscale="log", yscale="log", xlabel="tokens in memory")
        sizes = sorted({record["tokens"] for record in records})
        panel.set_xticks(sizes, [_short(size) for size in sizes])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{queries:,} {'query' if queries == 1 else 'queries'} a lane", fontsize=11)
        panel.grid(which="major", color="#e3e5e8", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    # Of one lane, so that sizes measured with fewer lanes stand beside the others.
    panels[0].set_ylabel("microseconds a query and lane")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def _short(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 2**10}k"
