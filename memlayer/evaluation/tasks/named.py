"""Evaluate a task from names: of a task, of a model, of a folder. What ``memlayer eval`` runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import memlayer
from memlayer.devices import choose_device
from memlayer.errors import ConfigError
from memlayer.evaluation.run import load_subject
from memlayer.evaluation.tasks.lookup import find_task
from memlayer.evaluation.tasks.options import TaskOptions
from memlayer.evaluation.tasks.run import evaluate_task

if TYPE_CHECKING:
    from memlayer.evaluation.options import Progress
    from memlayer.evaluation.tasks.results import TaskResult
    from memlayer.evaluation.tasks.task import Split
    from memlayer.plugins import Plugins


def evaluate_task_from_names(
    name: str,
    options: TaskOptions | None = None,
    task_options: Any = None,
    *,
    data: str | Path | None = None,
    split: Split = "test",
    checkpoint: str | None = None,
    backbone: str | None = None,
    backend: str | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    progress: Progress | None = None,
    plugins: Plugins | None = None,
) -> TaskResult:
    """Find a task, load a model, evaluate.

    Args:
        name: what ``memlayer plugins`` lists as a task.
        options: conditions and items; the defaults if None.
        task_options: of the task's ``options_type``; its defaults if None.
        data: the folder of data sets.
        split: which part of them.
        checkpoint: what `memlayer.load` takes. Either this or ``backbone``.
        backbone: what `memlayer.load_backbone` takes, to be evaluated alone.
        backend: a retrieval backend instead of the checkpoint's.
        dtype: of the backbone.
        device: ``"auto"`` is ``"cuda"`` where there is one, else ``"cpu"``.
        progress: as for `evaluate_task`.
        plugins: where tasks are looked up; the installed ones if None.

    Raises:
        ConfigError: if not exactly one of checkpoint and backbone is given, or an option does not
            fit.
        MemlayerError: of the kind that fits whatever else is wrong with names, files or data.
    """
    task = find_task(name, task_options, plugins)
    options = TaskOptions() if options is None else options
    if task.needs_data and data is None:
        raise ConfigError(f"task {name!r} reads files; give the folder that they are in as data")
    place = {"dtype": dtype, "device": choose_device(device)}
    model, loaded = load_subject(checkpoint, backbone, backend, place)
    result = evaluate_task(
        model,
        loaded.tokenizer,
        task,
        options,
        data=None if data is None else Path(data),
        split=split,
        progress=progress,
    )
    source = {
        "memlayer_version": memlayer.__version__,
        "checkpoint": checkpoint,
        "backbone": loaded.name,
        "data": None if data is None else str(data),
        **place,
    }
    return replace(result, settings=source | dict(result.settings))
