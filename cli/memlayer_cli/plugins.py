"""``memlayer plugins``: what is installed, where it comes from, and why something is missing."""

from __future__ import annotations

from typing import Any

import typer

from memlayer_cli.json_output import JsonOption, write_json
from memlayer_cli.session import Session


def plugins(ctx: typer.Context, json: JsonOption = None) -> None:
    """List backends, adapters, tasks and commands, and plug-ins that failed.

    Examples: memlayer plugins, memlayer plugins --json -
    """
    session: Session = ctx.obj
    found = {"plugins": _listed(session), "failures": _failures(session)}
    if json is not None:
        write_json(found, json)
    if json != "-":
        _show(found)


def _listed(session: Session) -> list[dict[str, Any]]:
    loaded = session.plugins
    rows = []
    for registry in (loaded.backends, loaded.adapters, loaded.tasks):
        for entry in registry.entries():
            reason = registry.unavailable_reason(entry.name)
            rows.append(
                {
                    "kind": registry.kind,
                    "name": entry.name,
                    "distribution": entry.source.distribution,
                    "version": entry.source.version,
                    "available": reason is None,
                    "reason": reason,
                    "install": entry.install_command if reason else None,
                }
            )
    for name, source in sorted(session.commands.items()):
        rows.append(
            {
                "kind": "command",
                "name": name,
                "distribution": source.distribution,
                "version": source.version,
                "available": True,
                "reason": None,
                "install": None,
            }
        )
    return rows


def _failures(session: Session) -> list[dict[str, Any]]:
    return [
        {"plugin": item.name, "distribution": item.distribution, "reason": item.reason}
        for item in session.plugins.failures
    ]


def _show(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Markup off: install commands have square brackets.
    console = Console(markup=False, highlight=False, emoji=False)
    table = Table("kind", "name", "distribution", "status")
    for row in found["plugins"]:
        origin = f"{row['distribution']} {row['version']}" if row["distribution"] else "-"
        table.add_row(
            row["kind"], row["name"], origin, "available" if row["available"] else "unavailable"
        )
    console.print(table)
    # Below the table, unwrapped: a command broken over two cells cannot be copied.
    for row in found["plugins"]:
        if not row["available"]:
            line = f"unavailable: {row['kind']} {row['name']}: {row['reason']}"
            if row["install"] and row["install"] not in row["reason"]:
                line += f" ({row['install']})"
            console.print(line, soft_wrap=True)
    for failure in found["failures"]:
        origin = f" of {failure['distribution']}" if failure["distribution"] else ""
        console.print(f"failed: {failure['plugin']}{origin}: {failure['reason']}", soft_wrap=True)
