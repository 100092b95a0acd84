"""The processes that train one model together, as ``accelerate launch`` started them.

    rows of a batch   ──► process 0: rows 0, 1    process 1: rows 2, 3    ...   each with its memory
    gradients         ◄── averaged: by DDP, or by FSDP2, which also keeps each layer in pieces

One process is the case with nothing to share. What a run computes does not depend on their number,
unless all rows share one memory: each process's rows then share one of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from memlayer.errors import ConfigError
from memlayer.pieces import whole
from memlayer.training.trackers import check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from memlayer.data import Batch
    from memlayer.model import LongMemModel
    from memlayer.training.options import TrainingOptions


class Processes:
    """This process among those of a training run.

    Args:
        options: of the run.
        device: where this process's model is.
        run: its directory, where trackers that write files put them.

    Attributes:
        accelerator: accelerate's state of this process.
        count: how many processes there are.
        index: which of them this is, from 0.
        is_main: whether it is the one that writes what all share.
        sharded: whether FSDP2 keeps the layers in pieces.

    Raises:
        ConfigError: if they were started for something else than DDP or FSDP2, or the rows of a
            batch cannot be shared out evenly; if there is no such tracker.
        BackendUnavailableError: if a tracker's package is not installed.
    """

    def __init__(self, options: TrainingOptions, device: torch.device, run: Path) -> None:
        check_trackers(options.report_to)
        # As accelerate launch says it; on CPUs accelerate itself refuses, or does not look.
        wanted = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        fsdp = os.environ.get("FSDP_VERSION", "1")
        if wanted and fsdp != "2":
            raise ConfigError(
                f"sharded training is FSDP 2, got version {fsdp}; give accelerate launch "
                "--fsdp_version 2"
            )
        self.accelerator = _make_accelerator(options, device, run)
        self.count: int = self.accelerator.num_processes
        self.index: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        self.sharded = wanted and self.count > 1
        kind = self.accelerator.distributed_type.value
        if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
            raise ConfigError(f"training runs under DDP or FSDP2, got {kind}; launch it without")
        if options.batch_size % self.count:
            raise ConfigError(
                f"batch_size must be a multiple of the {self.count} processes that share its rows, "
                f"got {options.batch_size}"
            )
        self._replicated: list[nn.Parameter] = []

    def prepare(self, model: LongMemModel) -> Callable[..., Any]:
        """Make a model train with its twins in the other processes.

        Under FSDP2 its layers, frozen and trained ones, are put into pieces in place.

        Returns:
            What to call for a forward.
        """
        if self.sharded:
            self._shard(model)
            return model
        if self.count == 1:
            return model
        places = [model.device] if model.device.type == "cuda" else None
        # A gate is not used while no row remembers anything.
        self._twin = nn.parallel.DistributedDataParallel(
            model, device_ids=places, find_unused_parameters=True, broadcast_buffers=False
        )
        return self._twin

    def share(self, batch: Batch) -> Batch:
        """Give the rows of a batch that are this process's."""
        rows = len(batch.input_ids) // self.count
        mine = slice(self.index * rows, (self.index + 1) * rows)
        return batch.rows(mine)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Hold gradients back inside the block, unless it is a step's last backward pass."""
        if last or self.count == 1 or self.sharded:
            return nullcontext()
        return self._twin.no_sync()

    def clip(self, groups: Sequence[dict[str, Any]], limit: float | None) -> float:
        """Finish the gradients, scale them down to a Euclidean norm, and give the norm before.

        Args:
            groups: an optimizer's; each has parameters in pieces only, or none.
            limit: None: never scale.
        """
        for parameter in self._replicated:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.count
        parts = [
            [weight for weight in group["params"] if weight.grad is not None] for group in groups
        ]
        norms = [
            whole(nn.utils.get_total_norm([weight.grad for weight in part])).double()
            for part in parts
            if part
        ]
        norm = torch.stack(norms).square().sum().sqrt().float()
        if limit is not None:
            for part in parts:
                nn.utils.clip_grads_with_norm_(part, limit, norm)
        return float(norm)

    def gather(self, *values: float) -> list[list[float]]:
        """Collect some numbers of every process: a list for each process."""
        if self.count == 1:
            return [list(values)]
        own = torch.tensor([values], dtype=torch.float64, device=self.accelerator.device)
        gathered: Tensor = self.accelerator.gather(own)
        return gathered.tolist()

    def any(self, wish: bool) -> bool:
        """Whether it is so in any process."""
        return any(value for (value,) in self.gather(wish))

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def _shard(self, model: LongMemModel) -> None:
        from torch.distributed.fsdp import fully_shard

        side = model.side_network
        if side.norm is None or side.twins:
            raise ConfigError(
                "side layers with the backbone's own weights (coupled, side_rank) are trained "
                "under DDP, got FSDP 2; launch it with --multi_gpu"
            )
        model.keep_identity()
        for layer in (*model.parts.layers, *side.layers, side.norm):
            fully_shard(layer, reshard_after_forward=True)
        self._replicated = side.mixing_parameters


def local_device(name: str) -> str:
    """Give the device of this process, where each process of a run has its own.

    Args:
        name: what `memlayer.devices.choose_device` gave.

    Raises:
        ConfigError: if it is one certain device, and there are several processes.
    """
    from accelerate.state import PartialState

    state = PartialState(cpu=name.startswith("cpu"))
    if state.num_processes == 1:
        return name
    if ":" in name:
        raise ConfigError(
            "device must be one of several alike, such as cuda or cpu, for "
            f"{state.num_processes} processes, got {name}"
        )
    return name if name == "cpu" else str(state.device)


def is_main_process() -> bool:
    """Whether this process speaks for all that `train` runs in."""
    from accelerate.state import PartialState

    return PartialState().is_main_process  # type: ignore[no-any-return]


def local_main_process_first() -> AbstractContextManager[None]:
    """Let one process of each machine go through a block before the others do."""
    from accelerate.state import PartialState

    first: AbstractContextManager[None] = PartialState().local_main_process_first()
    return first


def _make_accelerator(options: TrainingOptions, device: torch.device, run: Path) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    settings: dict[str, Any] = {
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[options.dtype],
        "cpu": device.type == "cpu",
        "device_placement": False,
    }
    if options.report_to:
        settings |= {"log_with": list(options.report_to), "project_dir": str(run)}
    try:
        return Accelerator(**settings)
    except ValueError:
        # One process has one accelerate state, and an earlier run in it had other settings.
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(**settings)
