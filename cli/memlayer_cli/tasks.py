"""``memlayer eval TASK``: one command for every registered task, its options read off the task.

A command is made when it is asked for: a task that cannot be imported costs its own command alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from memlayer.errors import MemlayerError, PluginError
from memlayer.evaluation.tasks.lookup import task_type
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer.options_help import field_docs
from memlayer_cli.json_output import STANDARD_OUTPUT, JsonOption, write_json
from memlayer_cli.model_options import (
    BackendOption,
    BareBackboneOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
)
from memlayer_cli.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from memlayer.evaluation.tasks.results import TaskResult
    from memlayer.evaluation.tasks.task import Task
    from memlayer.plugins import Plugins

_DATA_PANEL = "Items"
_TASK_PANEL = "Task"


def _evaluation(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder of data sets, laid out as docs/evaluation.md says.",
            rich_help_panel=_DATA_PANEL,
        ),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"],
        typer.Option(help="Part of the data sets.", rich_help_panel=_DATA_PANEL),
    ] = "test",
    checkpoint: CheckpointOption = None,
    backbone: BareBackboneOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = "fp32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Stand for what all task commands have in common; only its signature is used."""


class TaskGroup(TyperGroup):
    """Commands of its own, and one for each registered task."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Give the names of all commands; tasks last."""
        own = list(super().list_commands(ctx))
        return [*own, *(name for name in _plugins(ctx).tasks.names() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Give one command, made now if it is a task's."""
        own = super().get_command(ctx, cmd_name)
        loaded = _plugins(ctx)
        if own is not None or cmd_name not in loaded.tasks.names():
            return own
        app = typer.Typer(add_completion=False)
        app.command(cmd_name)(_command(cmd_name, loaded))
        return typer.main.get_command(app)


def _plugins(ctx: Any) -> Plugins:
    loaded: Plugins = ctx.find_root().obj.plugins
    return loaded


def _command(name: str, plugins: Plugins) -> Callable[..., None]:
    """Make the command of one task; of a broken one, a command that says what is wrong."""
    try:
        task = task_type(name, plugins)
        task_parameters = _parameters(task.options_type, _TASK_PANEL)
        parameters = [
            *inspect.signature(_evaluation, eval_str=True).parameters.values(),
            *_parameters(TaskOptions, _DATA_PANEL),
        ]
        _check_names(name, parameters, task_parameters)
    except MemlayerError as error:
        return _failing(error)
    common = {field.name for field in fields(TaskOptions)}
    own = {field.name for field in fields(task.options_type)}

    def command(**values: Any) -> None:
        json = values.pop("json")
        options = TaskOptions(**{key: values.pop(key) for key in common})
        task_options = task.options_type(**{key: values.pop(key) for key in own})
        from memlayer.evaluation.tasks.named import evaluate_task_from_names

        with progress_bar("scoring") as progress:
            result = evaluate_task_from_names(
                name, options, task_options, **values, progress=progress, plugins=plugins
            )
        if json is not None:
            write_json(result.to_dict(), json)
        if json != STANDARD_OUTPUT:
            _show(result)

    command.__doc__ = f"{task.summary}\n\n{_own_doc(task)}"
    return _with_signature(command, [*task_parameters, *parameters])


def _own_doc(task: type[Task]) -> str:
    return inspect.cleandoc(task.__doc__ or "").replace("``", "").replace("`", "")


def _failing(error: MemlayerError) -> Callable[..., None]:
    def command() -> None:
        raise error

    command.__doc__ = f"(cannot be used: {error})"
    return command


def _parameters(options_type: type[Any], panel: str) -> list[inspect.Parameter]:
    """Give one option for each field of a dataclass; its docstring is the help."""
    hints, docs = get_type_hints(options_type), field_docs(options_type)
    found = []
    for field in fields(options_type):
        hint: Any = hints[field.name]
        default: Any = field.default
        if get_origin(hint) is tuple:
            # One option, given several times.
            hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
        option = typer.Option(
            "--" + field.name.replace("_", "-"), help=docs[field.name], rich_help_panel=panel
        )
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[hint, option],
            )
        )
    return found


def _check_names(name: str, common: list[inspect.Parameter], own: list[inspect.Parameter]) -> None:
    taken = sorted({one.name for one in common} & {one.name for one in own})
    if taken:
        raise PluginError(
            f"task {name!r} has an option {taken[0]!r}, which every task has already; rename it"
        )


def _with_signature(
    command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    keyword = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    command.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in keyword}
    return command


def _show(result: TaskResult) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(_conditions(result))
    if result.differences:
        console.print(_differences(result))
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _conditions(result: TaskResult) -> Table:
    from rich.table import Table

    table = Table(title=f"{result.task}: {result.items} items, mean and standard error")
    table.add_column("condition")
    for metric in result.metrics:
        table.add_column(metric, justify="right")
    for name, scores in result.conditions.items():
        cells = [
            f"{score.mean:.3f}" + ("" if score.error is None else f" ± {score.error:.3f}")
            for score in scores.values()
        ]
        table.add_row(name, *cells)
    if result.chance is not None:
        table.add_row("chance", f"{result.chance:.3f}")
    return table


def _differences(result: TaskResult) -> Table:
    from rich.table import Table

    table = Table(title="differences over the same items")
    for name in ("metric", "condition", "against"):
        table.add_column(name)
    for name in ("difference", "95 % interval"):
        table.add_column(name, justify="right")
    for item in result.differences:
        interval = "" if item.low is None else f"{item.low:+.3f} to {item.high:+.3f}"
        table.add_row(
            item.metric, item.condition, item.against, f"{item.difference:+.3f}", interval
        )
    return table
