"""Checkpoints of a running training, from which it goes on as if it had never stopped.

    OUTPUT/checkpoints/step-000100/
        state.json                  step, position in the data, a digest of every other file
        side_network.safetensors    the trained weights
        optimizer.safetensors       AdamW's moments, by name of the weight
        random.safetensors          states of torch's generators
        memory/                     what each stream remembers

A checkpoint is written beside its final name and renamed when all of it is on the disk: a
directory called ``step-...`` is whole. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memlayer.errors import CheckpointError, ConfigError, TrainingError
from memlayer.files import sync_directory, sync_tree
from memlayer.pieces import put
from memlayer.training.options import MAY_CHANGE_ON_RESUME

CHECKPOINTS = "checkpoints"
FORMAT_VERSION = 1
STATE = "state.json"


def checkpoint_path(run: Path, step: int) -> Path:
    """Give where the checkpoint after one step belongs."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Give the checkpoints of a run, oldest first."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Find the newest whole checkpoint of a run.

    Returns:
        Its path, or None where the run has no checkpoint yet; and what is wrong with each newer
        one that had to be passed over.

    Raises:
        CheckpointError: if there are checkpoints and all of them are damaged.
    """
    problems = []
    for path in reversed(list_checkpoints(run)):
        try:
            read_state(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path, problems
    if problems:
        raise CheckpointError(
            f"no checkpoint of {run} is whole ({'; '.join(problems)}); "
            f"restore one from a copy, or train into another directory"
        )
    return None, []


def write_checkpoint(
    run: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    write: Callable[[Path], None],
    keep: int,
    is_main: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint after one step, whole or not at all, and delete old ones.

    Args:
        run: the directory of the training run.
        step: optimiser steps done.
        state: what ``state.json`` holds besides the digests; JSON types.
        write: writes all other files into the directory it is given.
        keep: newest checkpoints that stay.
        is_main: whether this process writes what all of a run's processes share.
        wait: gives back when every process has called it.

    Raises:
        TrainingError: if the files cannot be written; older checkpoints are as before.
    """
    final = checkpoint_path(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        if is_main:
            _remove_leftovers(run)
            temporary.mkdir(parents=True)
        wait()
        write(temporary)
        wait()
        if not is_main:
            wait()
            return final
        text = json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "step": step,
                **state,
                "files": {name: _digest(temporary / name) for name in _file_names(temporary)},
            }
        )
        (temporary / STATE).write_text(text, encoding="utf-8")
        sync_tree(temporary)
        if final.exists():
            _remove(final)  # The same step again, or a damaged one that was passed over.
        temporary.rename(final)
        sync_directory(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(run)
        raise TrainingError(
            f"the checkpoint of step {step} could not be written to {final} ({error}); make room "
            f"and resume from {kept[-1] if kept else 'the start, since no other was written yet'}"
        ) from error
    for path in list_checkpoints(run)[:-keep]:
        _remove(path)
    wait()
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read ``state.json`` and check that every file of the checkpoint is as it was written.

    Raises:
        CheckpointError: if a file is missing or differs, or the format is unknown.
    """
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, files = state["format_version"], dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must be the state of a training run, got {error!r}; resume from another "
            f"checkpoint"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}, this memlayer reads {FORMAT_VERSION}; "
            f"resume with the memlayer that wrote it"
        )
    for name, digest in files.items():
        file = checkpoint / name
        if not file.is_file() or _digest(file) != digest:
            problem = "differs from what was written" if file.is_file() else "is missing"
            raise CheckpointError(f"{file} {problem}; resume from another checkpoint")
    return dict(state)


def check_same_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to resume a run with settings that would change its losses.

    Args:
        saved: groups of settings, as the run was begun: ``{"options": {"steps": 500, ...}}``.
        current: the same for now.

    Raises:
        ConfigError: naming the first setting that differs, and both values.
    """
    for group, values in current.items():
        before = saved.get(group, {})
        for name in sorted({*values, *before} - MAY_CHANGE_ON_RESUME):
            if before.get(name) != values.get(name):
                raise ConfigError(
                    f"{name} was {before.get(name)!r} when this run began, got "
                    f"{values.get(name)!r}; resume with the former, or train into another "
                    f"directory"
                )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Give the optimiser's state as named tensors: ``"<state>/<parameter>"``."""
    return {
        f"{key}/{name}": value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put the state that `optimizer_tensors` gave into a new optimiser."""
    for label, value in tensors.items():
        key, _, name = label.partition("/")
        parameter = parameters[name]
        if not value.ndim:
            # AdamW keeps its step counts, which have no dimensions, on the CPU.
            optimizer.state[parameter][key] = value
            continue
        optimizer.state[parameter][key] = torch.zeros_like(parameter, requires_grad=False)
        put(optimizer.state[parameter][key], value)


def random_tensors() -> dict[str, Tensor]:
    """Give the states of torch's generators as byte tensors."""
    states = {"cpu": torch.get_rng_state()}
    for number in range(torch.cuda.device_count()):
        states[f"cuda:{number}"] = torch.cuda.get_rng_state(number)
    return states


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Set torch's generators to the states that `random_tensors` gave."""
    for device, state in tensors.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors, onto the CPU.

    Raises:
        CheckpointError: if the file is not what `write_tensors` wrote.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); resume from another checkpoint"
        ) from error


def _file_names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill amid the deletion leaves no ``step-...`` directory with parts missing.
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(run: Path) -> None:
    for path in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path)
