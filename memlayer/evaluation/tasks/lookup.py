"""Tasks by name. No torch here: the command line asks for a task's options to print its help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlayer.errors import PluginError
from memlayer.evaluation.tasks.task import Task
from memlayer.plugins import default_plugins

if TYPE_CHECKING:
    from memlayer.plugins import Plugins


def find_task(name: str, task_options: Any = None, plugins: Plugins | None = None) -> Task:
    """Give a task by its name.

    Raises:
        UnknownNameError: if no plug-in registered it.
        PluginError: if it cannot be imported, or is no task.
    """
    return task_type(name, plugins)(task_options)


def task_type(name: str, plugins: Plugins | None = None) -> type[Task]:
    """Give a task's class by its name, as `find_task` does."""
    registry = (default_plugins() if plugins is None else plugins).tasks
    found = registry.get(name)
    if not isinstance(found, type) or not issubclass(found, Task):
        raise PluginError(
            f"task {name!r} of {registry.entry(name).source} is {found!r}, no subclass of Task"
        )
    return found
