"""``memlayer bench``: the retrieval backends, measured on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memlayer.benchmarking.options import BackendSetup, BenchmarkOptions
from memlayer_cli.json_output import STANDARD_OUTPUT, JsonOption, write_json
from memlayer_cli.progress import progress_bar
from memlayer_cli.session import Session

if TYPE_CHECKING:
    from rich.table import Table

    from memlayer.benchmarking import BenchmarkResult, Measurement, SearchTime

OPTIONS = BenchmarkOptions()
INTERRUPTED = 130

_MEMORY_PANEL = "Memory and queries"
_RUN_PANEL = "The measurement"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def bench(
    ctx: typer.Context,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="Backend to measure; may be repeated. Default: all that are installed.",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help=f"Tokens of memory a row; may be repeated. Default: {_numbers(OPTIONS.tokens)}.",
            rich_help_panel=_MEMORY_PANEL,
        ),
    ] = None,
    queries: Annotated[
        list[int] | None,
        typer.Option(
            help="Queries of one search in each lane, 1 being a step of decoding; may be repeated. "
            f"Default: {_numbers(OPTIONS.queries)}.",
            rich_help_panel=_MEMORY_PANEL,
        ),
    ] = None,
    chunk_size: Annotated[
        int, typer.Option(help="Tokens behind one vector.", rich_help_panel=_MEMORY_PANEL)
    ] = OPTIONS.chunk_size,
    top_k: Annotated[
        int, typer.Option(help="Tokens that a query finds.", rich_help_panel=_MEMORY_PANEL)
    ] = OPTIONS.top_k,
    rows: Annotated[
        int, typer.Option(help="Rows of a batch.", rich_help_panel=_MEMORY_PANEL)
    ] = OPTIONS.rows,
    heads: Annotated[
        int | None,
        typer.Option(
            help="Key/value heads. Default: 4, or those of --pairs.", rich_help_panel=_MEMORY_PANEL
        ),
    ] = OPTIONS.heads,
    head_dim: Annotated[
        int | None,
        typer.Option(
            help="Length of a vector. Default: 64, or that of --pairs.",
            rich_help_panel=_MEMORY_PANEL,
        ),
    ] = OPTIONS.head_dim,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="keys (lanes, n, dim) and queries (lanes, q, dim) of a model. Default: vectors "
            "drawn to be like such.",
            rich_help_panel=_MEMORY_PANEL,
        ),
    ] = OPTIONS.pairs,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_RUN_PANEL)
    ] = OPTIONS.device,
    rounds: Annotated[
        int,
        typer.Option(help="Times that each search is timed.", rich_help_panel=_RUN_PANEL),
    ] = OPTIONS.rounds,
    budget: Annotated[
        float,
        typer.Option(
            help="Seconds; what would take longer is skipped, and said.",
            rich_help_panel=_RUN_PANEL,
        ),
    ] = OPTIONS.budget,
    seed: Annotated[
        int, typer.Option(help="Of vectors that are drawn.", rich_help_panel=_RUN_PANEL)
    ] = OPTIONS.seed,
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="Keep the result: the backend 'auto' chooses by it from then on."
        ),
    ] = False,
    json: JsonOption = None,
) -> None:
    r"""Measure the retrieval backends on this machine.

    For each size of memory: what it costs to add a vector, at first and to
    a full memory that drops its oldest; what a search takes; and how much of
    the true best it finds. Ctrl-C shows what is there.

    Examples:
        memlayer bench

        memlayer bench --backend torch --backend hnswlib:ef_search=64 --tokens 262144 --budget 600

        memlayer bench --pairs pairs.safetensors --budget 600 --save
    """
    options = BenchmarkOptions(
        backends=[BackendSetup.parse(text) for text in backend or ()],
        tokens=tokens or OPTIONS.tokens,
        queries=queries or OPTIONS.queries,
        chunk_size=chunk_size,
        top_k=top_k,
        rows=rows,
        heads=heads,
        head_dim=head_dim,
        pairs=pairs,
        device=device,
        rounds=rounds,
        budget=budget,
        seed=seed,
    )
    from memlayer.benchmarking import run_benchmark, save_table

    session: Session = ctx.obj
    with progress_bar("measuring") as progress:
        result = run_benchmark(options, plugins=session.plugins, progress=progress)
    if json is not None:
        write_json(result.to_dict(), json)
    if json != STANDARD_OUTPUT:
        _show(result, chunk_size)
    if result.interrupted:
        if save:
            typer.echo("not saved: only a whole benchmark is", err=True)
        raise typer.Exit(INTERRUPTED)
    if save:
        path = save_table(result)
        typer.echo(f"saved: {path}, by which the backend 'auto' chooses", err=json is not None)


def _show(result: BenchmarkResult, chunk_size: int) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    table = result.table
    for size in sorted({item.size for item in table.measurements}):
        held = f"{size * chunk_size:,} tokens: {size:,} vectors a lane, lanes: {table.lanes}"
        console.print(_table(held, [item for item in table.measurements if item.size == size]))
    for item in result.skipped:
        where = "" if item.size is None else f" at {item.size * chunk_size:,} tokens"
        console.print(f"skipped: {item.setup}{where}: {item.reason}", soft_wrap=True)
    machine = table.machine
    libraries = ", ".join(f"{name} {number}" for name, number in machine.libraries.items())
    console.print(
        f"vectors: {table.vectors}; {table.dim} long, {table.k} found per query\n"
        f"machine: {machine.processor}, {machine.threads} threads, {libraries}\n"
        f"took {result.seconds:.0f} s",
        soft_wrap=True,
    )


def _table(title: str, measurements: list[Measurement]) -> Table:
    from rich.table import Table

    table = Table(
        title=title, caption="µs per vector; ms per search of all lanes ± half the spread"
    )
    table.add_column("backend", overflow="fold")
    columns = ["recall", "add", "append"]
    columns += [_queries(item.queries) for item in measurements[0].search]
    for name in columns:
        table.add_column(name, justify="right")
    for item in measurements:
        table.add_row(
            str(item.setup),
            "exact" if item.exact else f"{min(item.recall, item.recall_after_turn):.3f}",
            f"{1e6 * item.add:.2f}",
            f"{1e6 * item.append:.2f}",
            *map(_search, item.search),
        )
    return table


def _queries(number: int) -> str:
    return f"{number:,} {'query' if number == 1 else 'queries'}"


def _search(time: SearchTime) -> str:
    spread = (time.high - time.low) / (2 * max(time.seconds, 1e-9))
    milliseconds = 1e3 * time.seconds
    shown = f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}"
    return f"{shown} ±{100 * spread:.0f} %"
