"""One optimiser step.

    learning rates ─► for each segment: forward, loss, backward ─► clip ─► AdamW
                          ▲                └─► what was new of it, remembered
                          └── where an excerpt begins: its lead, memorized

With ``memory_dropout`` some of the forwards read no memory; what they write is the same.

The memory of a row whose document has ended is cleared, and no other row's.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from memlayer.data import IGNORED
from memlayer.errors import TrainingError
from memlayer.training import checkpoints
from memlayer.training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from memlayer.data import Batch
    from memlayer.model import LongMemModel
    from memlayer.training.options import TrainingOptions
    from memlayer.training.processes import Processes


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did.

    Attributes:
        tokens: trained on, in all processes.
        seconds: that it took.
        scores: the rest of what the log says of a step; JSON types.
    """

    tokens: int
    seconds: float
    scores: dict[str, Any]


class Stepper:
    """Takes the steps of one training run.

    Args:
        model: whose memory is read and written.
        forward: what to call for a forward of it; see `Processes.prepare`.
        batches: segments of all processes' rows.
        processes: that train together.
        options: of the run.
        steps: of the whole run, for the learning rates.
        output: the run's directory, to name its last good checkpoint.

    Attributes:
        optimizer: AdamW over what trains.
    """

    def __init__(
        self,
        model: LongMemModel,
        forward: Callable[..., Any],
        batches: Iterator[Batch],
        processes: Processes,
        options: TrainingOptions,
        *,
        steps: int,
        output: Path,
    ) -> None:
        self._model = model
        self._forward = forward
        self._batches = batches
        self._processes = processes
        self._options = options
        self._steps = steps
        self._output = output
        groups = model.parameter_groups(
            learning_rate=options.learning_rate,
            gate_learning_rate=options.gate_learning_rate,
            weight_decay=options.weight_decay,
        )
        self._peaks = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(options.beta1, options.beta2), eps=options.epsilon
        )

    def take(self, step: int) -> StepReport:
        """Take one step, the first being 1.

        Raises:
            TrainingError: if the loss or the gradient is not finite; the weights are as before.
        """
        began = time.perf_counter()
        options, processes = self._options, self._processes
        factor = learning_rate_factor(step, steps=self._steps, warmup=options.warmup)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        batches = [next(self._batches) for _ in range(options.gradient_accumulation)]
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        parts, held = [], 0
        for number, batch in enumerate(batches, start=1):
            share, last = processes.share(batch), number == len(batches)
            self._memorize_lead(share)
            reading = self._reads_memory(step, number)
            # The longest memory that this step had to read.
            held = max(held, len(self._model.memory) if reading else 0)
            with nullcontext() if reading else self._model.disable_memory():
                parts.append(self._accumulate_gradient(share, targets, last=last))
        gathered = processes.gather(float(torch.stack(parts).sum()), held)
        loss = math.fsum(part for part, _ in gathered)
        if not math.isfinite(loss):
            raise self.diverged(step, "loss", loss)
        norm = processes.clip(self.optimizer.param_groups, options.max_gradient_norm)
        if not math.isfinite(norm):
            raise self.diverged(step, "gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        tokens = sum(int(batch.fresh.sum()) for batch in batches)
        seconds = time.perf_counter() - began
        return StepReport(
            tokens=tokens,
            seconds=seconds,
            scores={
                "loss": loss,
                "learning_rate": options.learning_rate * factor,
                "gate_learning_rate": options.gate_learning_rate * factor,
                "gradient_norm": norm,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "memory_tokens": int(max(tokens for _, tokens in gathered)),
                "gate_mean": self._gate_mean(),
            },
        )

    def _reads_memory(self, step: int, number: int) -> bool:
        """Choose for a step's batch, in every process and after resuming alike."""
        choice = random.Random(f"{self._options.seed}/{step}/{number}")
        return choice.random() >= self._options.memory_dropout

    def _memorize_lead(self, batch: Batch) -> None:
        """Fill the memory of rows whose excerpt begins with this batch."""
        if batch.lead.numel():
            device = self._model.device
            with self._processes.accelerator.autocast():
                self._model.memorize(
                    batch.lead.to(device), batch.lead_mask.to(device), keep_text=False
                )

    def _accumulate_gradient(self, batch: Batch, targets: int, *, last: bool) -> Tensor:
        """Add this process's part of a batch to the gradient; give its part of the step's loss."""
        device = self._model.device
        processes = self._processes
        with processes.accumulating(last), processes.accelerator.autocast():
            logits = self._forward(
                batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                update_memory=batch.fresh.to(device),
            ).logits
        # Over all target tokens of the step: the mean of the batches' means would give tokens of
        # a batch with much padding more weight.
        loss: Tensor = (
            functional.cross_entropy(
                logits.float().flatten(0, 1),
                batch.targets.to(device).flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            / targets
        )
        with processes.accumulating(last):
            # Gradients are averaged over processes, and the loss is a sum over them.
            (loss * processes.count).backward()
        # After the backward pass, which reads the memory once more. A memory that all rows share
        # has no row to clear: it goes on over the ends of documents.
        if not self._model.memory.shared:
            self._model.memory.clear(batch.ends.nonzero().flatten().tolist())
        return loss.detach()

    def _gate_mean(self) -> float:
        gates = [torch.sigmoid(gate.detach()).flatten() for gate in self._model.side_network.gates]
        return float(torch.cat(gates).mean())

    def diverged(self, step: int, what: str, value: float) -> TrainingError:
        """Say that a number of the run is none any more, and what is left."""
        path, _ = checkpoints.newest_checkpoint(self._output)
        kept = f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"
        return TrainingError(
            f"the {what} is {value} at step {step}; {kept}; train into another directory with "
            f"lower learning rates than learning_rate={self._options.learning_rate} and "
            f"gate_learning_rate={self._options.gate_learning_rate}"
        )
