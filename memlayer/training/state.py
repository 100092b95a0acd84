"""Everything that a training step depends on, written into a checkpoint and read back.

side_network, optimizer         one file each: the same in all processes, or whole of their pieces
random, memory                  each process's own: its generators, its rows' memories
state.json                      the place in the data; see checkpoints.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memlayer.pieces import put, whole
from memlayer.training import checkpoints

if TYPE_CHECKING:
    from memlayer.memory import MemoryBank
    from memlayer.training.processes import Processes

WEIGHTS, OPTIMIZER = "side_network.safetensors", "optimizer.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What changes from step to step, where it lies.

    Attributes:
        parameters: that are trained, by name.
        optimizer: of these.
        memory: of this process's rows.
        processes: that train together.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    memory: MemoryBank
    processes: Processes

    def save(
        self,
        run: Path,
        *,
        step: int,
        progress: Mapping[str, Any],
        keep: int,
        check: Callable[[str, Tensor], None],
    ) -> Path:
        """Write the checkpoint after one step.

        Args:
            run: the run's directory.
            step: optimiser steps done.
            progress: what else to keep; JSON types.
            keep: newest checkpoints that stay.
            check: is called with each weight's name and numbers before anything is written.

        Raises:
            TrainingError: if the files cannot be written.
        """
        weights = {name: whole(weight.detach()) for name, weight in self.parameters.items()}
        for name, weight in weights.items():
            check(name, weight)
        tensors = checkpoints.optimizer_tensors(self.optimizer, self.parameters)
        moments = {name: whole(value) for name, value in tensors.items()}

        def write(directory: Path) -> None:
            if self.processes.is_main:
                checkpoints.write_tensors(directory / WEIGHTS, weights)
                checkpoints.write_tensors(directory / OPTIMIZER, moments)
            random = checkpoints.random_tensors()
            checkpoints.write_tensors(directory / self._own("random", ".safetensors"), random)
            self.memory.save(directory / self._own("memory"))

        return checkpoints.write_checkpoint(
            run,
            step=step,
            state=progress,
            write=write,
            keep=keep,
            is_main=self.processes.is_main,
            wait=self.processes.wait,
        )

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Put everything back as it was, and give what else was kept, with ``step``.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        state = checkpoints.read_state(checkpoint)
        weights = checkpoints.read_tensors(checkpoint / WEIGHTS)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                put(parameter, weights[name])
        moments = checkpoints.read_tensors(checkpoint / OPTIMIZER)
        checkpoints.restore_optimizer(self.optimizer, self.parameters, moments)
        self.memory.load(checkpoint / self._own("memory"))
        random = checkpoints.read_tensors(checkpoint / self._own("random", ".safetensors"))
        checkpoints.restore_random(random)
        return state

    def _own(self, name: str, suffix: str = "") -> str:
        """Name a file of a checkpoint that each process has one of."""
        alone = self.processes.count == 1
        return f"{name}{suffix}" if alone else f"{name}-{self.processes.index}{suffix}"
