"""``memlayer bank``: what a bank on disk holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memlayer_cli.json_output import STANDARD_OUTPUT, JsonOption, write_json

if TYPE_CHECKING:
    from memlayer.memory.store import BankInfo

DAMAGED = 1

bank = typer.Typer(no_args_is_help=True, help="Look at a memory bank on disk.")

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The bank's directory.")]


@bank.command()
def info(directory: Directory, json: JsonOption = None) -> None:
    """Show what a bank holds: its model, its size and its documents.

    Only the bank's manifest is read; 'memlayer bank verify' reads everything.

    Examples: memlayer bank info novels.bank, memlayer bank info novels.bank --json -
    """
    from memlayer.memory.store import bank_info

    found = bank_info(directory)
    if json is not None:
        write_json(found.to_dict(), json)
    if json != STANDARD_OUTPUT:
        show_bank(found)


@bank.command()
def verify(directory: Directory, json: JsonOption = None) -> None:
    """Read all of a bank, and list whatever is damaged; nothing is changed.

    The exit code is 0 for a bank that is whole, and 1 for one that is not.

    Examples: memlayer bank verify novels.bank, memlayer bank verify novels.bank --json -
    """
    from rich.console import Console

    from memlayer.memory.store import verify_bank
    from memlayer_cli.progress import loading

    with loading("reading the bank"):
        report = verify_bank(directory)
    if json is not None:
        write_json(report.to_dict(), json)
    if json != STANDARD_OUTPUT:
        console = Console(markup=False, highlight=False)
        for problem in report.problems:
            console.print(f"damaged: {problem}", soft_wrap=True)
        if report.whole:
            console.print(
                f"whole: {report.files:,} files, {megabytes(report.size)}", soft_wrap=True
            )
    if not report.whole:
        raise typer.Exit(DAMAGED)


def show_bank(found: BankInfo) -> None:
    """Print what a bank holds."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    held = ", ".join(f"{length:,}" for length in found.lengths) or "0"
    rows = f" in {found.rows} rows" if found.rows > 1 else ""
    facts = {
        "holds": f"{held} of {found.capacity:,} tokens{rows}, in chunks of {found.chunk_size}",
        "model": f"{found.identity}, {found.dtype}",
        "on disk": f"{megabytes(found.size)}, {found.shards:,} shards, state {found.generation:,}, "
        f"written by memlayer {found.memlayer_version}",
    }
    for name, value in facts.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    if not found.documents:
        console.print("documents: none that have a name")
        return
    table = Table("document")
    table.add_column("tokens", justify="right")
    table.add_column("memorized")
    for document in found.documents:
        whole = "whole" if document.complete else "in part"
        table.add_row(Text(document.name), f"{document.tokens:,}", whole)
    console.print(table)


def megabytes(size: int) -> str:
    """Write a number of bytes for people."""
    return f"{size / 1e6:,.1f} MB"
