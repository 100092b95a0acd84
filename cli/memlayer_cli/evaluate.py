"""``memlayer eval``: what a model can do with its memory and without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memlayer.evaluation.options import PerplexityOptions
from memlayer_cli.json_output import STANDARD_OUTPUT, JsonOption, write_json
from memlayer_cli.model_options import (
    BackendOption,
    BareBackboneOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    check_one_model,
)
from memlayer_cli.progress import progress_bar
from memlayer_cli.tasks import TaskGroup
from memlayer_cli.train import DEFAULT_DATA

if TYPE_CHECKING:
    from rich.table import Table

    from memlayer.evaluation import Interval, PerplexityResult, WindowReport

OPTIONS = PerplexityOptions()

evaluate = typer.Typer(
    cls=TaskGroup, no_args_is_help=True, help="Evaluate a checkpoint or a backbone."
)

_DATA_PANEL = "Data"
_WINDOW_PANEL = "Windows and memory"


@evaluate.command()
def perplexity(
    checkpoint: CheckpointOption = None,
    backbone: BareBackboneOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "fp32",
    device: DeviceOption = "auto",
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Text: FILE, DIR, hf:NAME, python-docs or python-stdlib; may be repeated. "
            f"Default: {DEFAULT_DATA}.",
            rich_help_panel=_DATA_PANEL,
        ),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test", "all"],
        typer.Option(
            help="Documents of --data to evaluate on; all where --data is a split already.",
            rich_help_panel=_DATA_PANEL,
        ),
    ] = "validation",
    max_documents: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate the first N only.", rich_help_panel=_DATA_PANEL),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Evaluate the first N of each document only.", rich_help_panel=_DATA_PANEL
        ),
    ] = None,
    memory_size: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens that memory holds; may be repeated. Default: the checkpoint's.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = None,
    no_memory: Annotated[
        bool,
        typer.Option("--no-memory", help="Leave memory out.", rich_help_panel=_WINDOW_PANEL),
    ] = False,
    foreign_memory: Annotated[
        bool,
        typer.Option(
            "--foreign-memory",
            help="Also read the next document's memory, which ought not to help.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.foreign_memory,
    knn_lm: Annotated[
        bool,
        typer.Option(
            "--knn-lm",
            help="Also let the backbone read the same past by kNN-LM, which needs no training.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.knn_lm,
    knn_neighbors: Annotated[
        int, typer.Option(help="Of kNN-LM: contexts that vote.", rich_help_panel=_WINDOW_PANEL)
    ] = OPTIONS.knn_neighbors,
    knn_weight: Annotated[
        float,
        typer.Option(help="Of kNN-LM: weight of the votes, 0 to 1.", rich_help_panel=_WINDOW_PANEL),
    ] = OPTIONS.knn_weight,
    knn_temperature: Annotated[
        float,
        typer.Option(
            help="Of kNN-LM: of squared distances; choose it on validation data.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.knn_temperature,
    segment_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window. Default: the checkpoint's.", rich_help_panel=_WINDOW_PANEL
        ),
    ] = OPTIONS.segment_length,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window to the next; fewer than --segment-length make windows "
            "overlap. Default: as many, fresh segments.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.stride,
    fresh: Annotated[
        bool,
        typer.Option(
            help="With overlapping windows, report fresh segments too.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.fresh,
    dense_context: Annotated[
        int | None,
        typer.Option(
            help="Score the bare backbone with N tokens of context too, as the bound.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.dense_context,
    dense_stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one dense window to the next; more is faster. Default: "
            "--segment-length.",
            rich_help_panel=_WINDOW_PANEL,
        ),
    ] = OPTIONS.dense_stride,
    json: JsonOption = None,
) -> None:
    """Measure perplexity with memory, without it, and of the backbone alone.

    All conditions score the same tokens: every document but its first token. Fresh segments flatter
    any memory, since their first tokens have little local context; --stride gives every token more.

    Examples:
        memlayer eval perplexity --checkpoint run --data books/ --stride 256 --max-tokens 12000

        memlayer eval perplexity --checkpoint run --memory-size 1024 --memory-size 65536 --json -

        memlayer eval perplexity --backbone smollm2-135m --segment-length 512 --dense-context 4096
    """
    check_one_model(checkpoint, backbone)
    if no_memory and memory_size:
        raise typer.BadParameter("--no-memory and --memory-size exclude each other")
    options = PerplexityOptions(
        segment_length=segment_length,
        stride=stride,
        fresh=fresh,
        memory_sizes=() if no_memory else memory_size,
        foreign_memory=foreign_memory,
        knn_lm=knn_lm,
        knn_neighbors=knn_neighbors,
        knn_weight=knn_weight,
        knn_temperature=knn_temperature,
        dense_context=dense_context,
        dense_stride=dense_stride,
    )
    from memlayer.evaluation import evaluate_perplexity_from_names

    with progress_bar("scoring") as progress:
        result = evaluate_perplexity_from_names(
            data or [DEFAULT_DATA],
            options,
            checkpoint=checkpoint,
            backbone=backbone,
            split=split,
            max_documents=max_documents,
            max_tokens=max_tokens,
            backend=backend,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if json is not None:
        write_json(result.to_dict(), json)
    if json != STANDARD_OUTPUT:
        _show(result)


@evaluate.command()
def suite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="paper (hours) or small (minutes).")],
    checkpoint: Annotated[
        str,
        typer.Option(metavar="DIR", help="Trained side network: a directory or a Hub id."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of data sets, laid out as docs/evaluation.md says."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results, report and figures.")
    ],
    control: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Side network trained without memory, to compare perplexities with.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Step to run; may be repeated. Default: all.")
    ] = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "fp32",
    device: DeviceOption = "auto",
) -> None:
    """Run a whole suite and write a report with figures.

    A step that has a result for the same weights, data and settings is not run again, so that the
    command can be given again after it was cut off.

    Example:
        memlayer eval suite paper --checkpoint run --control run-control --data data --output report
    """
    from memlayer.evaluation.suite.run import Subject, run_suite

    subject = Subject(
        checkpoint=checkpoint,
        control=control,
        data=data,
        backend=backend,
        dtype=dtype,
        device=device,
    )
    path = run_suite(name, subject, output, only=only or (), announce=_announce)
    typer.echo(f"wrote {path}")


def _announce(step: str, number: int, steps: int, there: bool) -> None:
    typer.echo(f"{number + 1}/{steps} {step}{' (there already)' if there else ''}", err=True)


def _show(result: PerplexityResult) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    length = result.settings["segment_length"]
    reports = [(result.overall, result.overall.stride)]
    if result.fresh is not None:
        reports.append((result.fresh, result.fresh.stride))
    for report, stride in reports:
        kind = "fresh segments" if stride == length else f"windows every {stride} tokens"
        console.print(_conditions(report, f"{kind} of {length}, {result.tokens:,} tokens scored"))
        # A backbone alone has no intervals but those of its dense context.
        compared = "dense" if result.headline == "backbone" else result.headline
        if compared in report.conditions:
            console.print(_intervals(report, compared))
    console.print(_by_position(result.overall))
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _conditions(report: WindowReport, title: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("condition")
    for name in ("perplexity", "bits per byte", "against backbone", "gap recovered"):
        table.add_column(name, justify="right")
    backbone = report.conditions["backbone"]
    for name, score in report.conditions.items():
        table.add_row(
            name,
            f"{score.perplexity:.3f}",
            f"{score.bits_per_byte:.4f}",
            "" if name == "backbone" else _change(score.loss - backbone.loss),
            "" if score.recovery is None else f"{100 * score.recovery:.1f} %",
        )
    return table


def _intervals(report: WindowReport, condition: str) -> Table:
    from rich.table import Table

    table = Table(title=f"{condition}: change of perplexity")
    for name in ("against", "change", "95 % interval"):
        table.add_column(name, justify="left" if name == "against" else "right")
    table.add_column("over")
    for item in report.intervals:
        if item.condition == condition:
            table.add_row(
                item.against,
                _change(item.difference),
                "too few" if item.low is None else f"{_change(item.low)} to {_change(item.high)}",
                _basis(item),
            )
    return table


def _basis(interval: Interval) -> str:
    return {
        "documents": f"{interval.units} documents, bootstrap",
        "documents-t": f"{interval.units} documents, Student's t",
        "blocks": f"{interval.units} blocks of them, bootstrap",
    }[interval.method]


def _by_position(report: WindowReport) -> Table:
    from rich.table import Table

    table = Table(title="perplexity by the tokens of local context")
    table.add_column("context", justify="right")
    table.add_column("tokens", justify="right")
    for name in report.conditions:
        table.add_column(name, justify="right")
    for item in report.by_position:
        values = [item.perplexity[name] for name in report.conditions]
        table.add_row(
            f"{item.start}-{item.end - 1}",
            f"{item.tokens:,}",
            *("" if value is None else f"{value:.2f}" for value in values),
        )
    return table


def _change(difference: float | None) -> str:
    """Give a difference of mean losses as the change of perplexity."""
    return "" if difference is None else f"{100 * math.expm1(difference):+.2f} %"
