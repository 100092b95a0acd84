"""The ``memlayer`` command: its sub-commands, global options, errors and exit codes.

Exit codes: 0 done, 1 something failed, 2 the user can put it right, 130 interrupted. Every error is
one line on standard error; ``memlayer --debug ...`` shows its traceback too.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

import memlayer
from memlayer.errors import MemlayerError, PluginError
from memlayer.plugins import DISTRIBUTION, Plugins, default_plugins
from memlayer.registry import Source
from memlayer_cli.bank import bank
from memlayer_cli.bench import bench
from memlayer_cli.convert import convert
from memlayer_cli.evaluate import evaluate
from memlayer_cli.generate import generate
from memlayer_cli.inspect import inspect
from memlayer_cli.memorize import memorize
from memlayer_cli.plugins import plugins
from memlayer_cli.session import Session
from memlayer_cli.train import train

INTERRUPTED = 130


def build_app() -> typer.Typer:
    """Make the app with the built-in commands; their modules import the library when called."""
    app = typer.Typer(add_completion=False)
    app.callback(invoke_without_command=True)(_global_options)
    app.command()(train)
    app.add_typer(evaluate, name="eval")
    app.command()(memorize)
    app.add_typer(bank, name="bank")
    app.command()(generate)
    app.command()(inspect)
    app.command()(plugins)
    app.command()(bench)
    app.add_typer(convert, name="convert")
    return app


def run(arguments: Sequence[str], loaded: Plugins | None = None) -> int:
    """Run one command line and give its exit code.

    Args:
        arguments: what follows ``memlayer``.
        loaded: the plug-ins to use; None for the installed ones.
    """
    session = Session(plugins=default_plugins() if loaded is None else loaded)
    app = build_app()
    _add_plugin_commands(app, session)
    try:
        outcome = typer.main.get_command(app).main(
            list(arguments), prog_name="memlayer", standalone_mode=False, obj=session
        )
    except TyperException as error:
        return _report_usage(error)
    except typer.Abort:
        outcome = INTERRUPTED
    except Exception as error:
        return _report(error, session.debug)
    if outcome == INTERRUPTED:
        typer.echo("memlayer: interrupted", err=True)
    # Commands return nothing; an int is the code of a typer.Exit.
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def _global_options(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Long-term memory for any Hugging Face decoder."""
    session: Session = ctx.obj
    session.debug = debug
    if version:
        typer.echo(f"memlayer {memlayer.__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit
    if session.plugins.failures and ctx.invoked_subcommand != "plugins":
        names = ", ".join(sorted({failure.name for failure in session.plugins.failures}))
        typer.echo(
            f"memlayer: warning: plug-ins that failed: {names}; see 'memlayer plugins'", err=True
        )


def _add_plugin_commands(app: typer.Typer, session: Session) -> None:
    own = Source(plugin="memlayer", distribution=DISTRIBUTION, version=memlayer.__version__)
    session.commands.update(dict.fromkeys(typer.main.get_group(app).commands, own))
    for plugin in session.plugins.loaded:
        added = typer.Typer()
        with session.plugins.isolated(plugin.source):
            session.plugins.call(plugin, "register_commands", app=added)
            _join(app, added, plugin.source, session.commands)


def _join(
    app: typer.Typer, added: typer.Typer, source: Source, commands: dict[str, Source]
) -> None:
    if not added.registered_commands and not added.registered_groups:
        return
    if added.registered_callback is not None:
        raise PluginError(f"{source} sets a callback; a plug-in adds commands and groups only")
    # Building them here, in the plug-in's isolation, finds a command that Typer cannot build.
    names = typer.main.get_group(added).commands
    for name in names:
        if name in commands:
            raise PluginError(
                f"command {name!r} of {source} is already registered by {commands[name]}, "
                "which keeps it"
            )
    app.registered_commands.extend(added.registered_commands)
    app.registered_groups.extend(added.registered_groups)
    commands.update(dict.fromkeys(names, source))


def _report_usage(error: TyperException) -> int:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "memlayer"
    message = _one_line(error.format_message()).rstrip(".")
    # A group without a command: Typer has shown its help, and the error says nothing more.
    if message:
        typer.echo(f"memlayer: error: {message}; see '{command} --help'", err=True)
    return error.exit_code


def _report(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, MemlayerError):
        typer.echo(f"memlayer: error: {_one_line(str(error))}", err=True)
        return 2 if isinstance(error, ValueError | ImportError) else 1
    typer.echo(
        f"memlayer: error: {type(error).__name__}: {_one_line(str(error))} "
        "(memlayer --debug ... shows where)",
        err=True,
    )
    return 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
