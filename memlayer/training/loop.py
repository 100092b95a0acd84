"""The training loop.

    Trainer.run ── per step: learning rates ─► segments ─► loss, backward ─► clip ─► AdamW ─► log
                └─ now and then: evaluate, write a checkpoint; at the end: save the side network

Everything that a step depends on is in a checkpoint (weights, AdamW's moments, random generators,
the place in the data, every stream's memory), so that a resumed run repeats the interrupted one.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

from memlayer.data import IGNORED, Document, StreamBatches, TokenDocument, tokenize_documents
from memlayer.errors import ConfigError, TrainingError
from memlayer.training import checkpoints
from memlayer.training.directory import check_output, describe_settings, read_run, write_run
from memlayer.training.evaluation import (
    Perplexities,
    check_sample,
    measure_perplexities,
    validation_sample,
)
from memlayer.training.interrupts import Interrupts
from memlayer.training.log import LOG_NAME, TrainingLog
from memlayer.training.plot import plot_curves, plotting_problem
from memlayer.training.processes import Processes
from memlayer.training.progress import TrainingProgress
from memlayer.training.results import TrainingResult
from memlayer.training.schedule import learning_rate_factor
from memlayer.training.state import TrainingState
from memlayer.training.trackers import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.data import Batch
    from memlayer.model import LongMemModel
    from memlayer.training.options import TrainingOptions


Documents: TypeAlias = Sequence[Document] | Sequence[TokenDocument]


def train(
    model: LongMemModel,
    tokenizer: PreTrainedTokenizerBase,
    train_documents: Documents,
    validation_documents: Documents,
    options: TrainingOptions,
    *,
    output: Path | str,
    resume: bool = False,
    progress: bool | None = None,
) -> TrainingResult:
    """Train the side network of a wrapped backbone, and write it with its log and curves.

    The model is trained in place, on its own device. Its memory is empty afterwards; torch's
    random generators are as before.

    Args:
        model: what `memlayer.wrap` gave.
        tokenizer: the backbone's.
        train_documents: at least ``batch_size`` of them; as text, or as tokens (`TokenCorpus`).
        validation_documents: likewise. May be empty; then nothing is evaluated.
        options: how to train.
        output: the run's directory, made if need be. It must not hold a run unless ``resume``.
        resume: go on from the run's newest whole checkpoint, or its start if it has none.
        progress: draw a progress bar on standard error. None: if that is a terminal.

    Raises:
        ConfigError: if the directory holds a run already, holds none to resume, or its run was
            begun with other settings or documents; if ``eval_tokens`` is too small.
        CheckpointError: if all of its checkpoints are damaged.
        DataError: if no document can be trained on, or memory not be evaluated.
        TrainingError: if the loss is not finite, or a checkpoint cannot be written.
        KeyboardInterrupt: after Ctrl-C, once the step is done and a checkpoint is written.
    """
    return Trainer(
        model,
        tokenizer,
        train_documents,
        validation_documents,
        options,
        output=output,
        resume=resume,
        progress=progress,
    ).run()


class Trainer:
    """One training run; `train` says what the arguments mean.

    Attributes:
        step: optimiser steps done.
        tokens: tokens read in them.
        seconds: time spent in them.
    """

    def __init__(
        self,
        model: LongMemModel,
        tokenizer: PreTrainedTokenizerBase,
        train_documents: Documents,
        validation_documents: Documents,
        options: TrainingOptions,
        *,
        output: Path | str,
        resume: bool = False,
        progress: bool | None = None,
    ) -> None:
        check_output(output, resume=resume)
        self.model = model
        self.options = options
        self.output = Path(output)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.segment_length = model.memory_config.segment_length
        self.stride = self.segment_length if options.stride is None else options.stride
        if self.stride < self.segment_length and model.memory_config.memory_scope != "row":
            raise ConfigError(
                f"stride={self.stride} below segment_length={self.segment_length} needs a memory "
                f"for each row, got memory_scope={model.memory_config.memory_scope!r}; leave "
                "stride out, or set memory_scope to 'row'"
            )
        self.steps = options.total_steps(self.segment_length)
        self._progress = progress
        self._resume = resume

        documents = _tokenized(train_documents, tokenizer)
        validation = _tokenized(validation_documents, tokenizer)
        self._batches = StreamBatches(
            documents,
            rows=options.batch_size,
            segment_length=self.segment_length,
            stride=self.stride,
            seed=options.seed,
            repeat=True,
        )
        self._sample = validation_sample(
            validation, tokens=options.eval_tokens, count=options.eval_documents
        )
        if validation:
            check_sample(self._sample, self.segment_length, options)
        self._processes = Processes(options, model.device, self.output)
        self._settings = describe_settings(
            model,
            options,
            processes=self._processes.count,
            documents=documents,
            validation=validation,
            sample=self._sample,
        )
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if options.compile:
            model.compile()
        self._forward = self._processes.prepare(model)
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        groups = model.parameter_groups(
            learning_rate=options.learning_rate,
            gate_learning_rate=options.gate_learning_rate,
            weight_decay=options.weight_decay,
        )
        self._peaks = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(options.beta1, options.beta2), eps=options.epsilon
        )
        self._memory = model.new_memory(overlap=self.segment_length - self.stride)
        self._state = TrainingState(
            parameters=parameters,
            optimizer=self._optimizer,
            memory=self._memory,
            processes=self._processes,
        )

    def run(self) -> TrainingResult:
        """Train to the end, or until Ctrl-C."""
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.options.seed + self._processes.index)
            self.model.memory.clear()
            own, self.model.memory = self.model.memory, self._memory
            self._processes.wait()  # every process has looked at the directory by now
            self.output.mkdir(parents=True, exist_ok=True)
            if self._resume:
                self._restore()
            main = self._processes.is_main
            if main:
                self._write_run(finished=False)
            trackers = Trackers(self._processes.accelerator, self._settings)
            log = TrainingLog(
                self.output / LOG_NAME, last_step=self.step, write=main, tell=trackers.log
            )
            self._processes.wait()  # and the log has been cut, where it goes on
            try:
                self._run_steps(log)
            finally:
                log.close()
                trackers.close()
                self.model.memory = own
        return self._finish(log)

    # ---------------------------------------------------------------- steps

    def _run_steps(self, log: TrainingLog) -> None:
        self.model.train()
        with (
            Interrupts() as interrupts,
            TrainingProgress(
                steps=self.steps,
                done=self.step,
                show=self._progress if self._processes.is_main else False,
            ) as progress,
        ):
            try:
                self._evaluate_if_due(log, interrupts, progress)
                while self.step < self.steps:
                    entry = self._train_step()
                    log.write(entry)
                    progress.stepped(self.step, entry["loss"])
                    self._evaluate_if_due(log, interrupts, progress)
                    if self._is_due(self.options.save_every) and self.step < self.steps:
                        progress.doing("saving")
                        self._save()
                    if self._processes.any(interrupts.requested):
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                # The check above or in an evaluation: between two steps, so all is whole. A second
                # Ctrl-C may come amid a step, and then nothing may be saved.
                if not interrupts.forced:
                    progress.doing("saving")
                    self._save()
                raise
        self.model.eval()

    def _train_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        step = self.step + 1
        factor = learning_rate_factor(step, steps=self.steps, warmup=self.options.warmup)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        batches = [next(self._batches) for _ in range(self.options.gradient_accumulation)]
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        # Each stream's memory at its longest: what this step had to read.
        held = len(self.model.memory)
        parts = [
            self._accumulate_gradient(
                self._processes.share(batch), targets, last=number == len(batches)
            )
            for number, batch in enumerate(batches, start=1)
        ]
        gathered = self._processes.gather(float(torch.stack(parts).sum()), held)
        loss = math.fsum(part for part, _ in gathered)
        if not math.isfinite(loss):
            raise self._diverged(step, "loss", loss)
        norm = self._processes.clip(self._optimizer.param_groups, self.options.max_gradient_norm)
        if not math.isfinite(norm):
            raise self._diverged(step, "gradient norm", norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

        tokens = sum(int(batch.fresh.sum()) for batch in batches)
        seconds = time.perf_counter() - began
        self.step, self.tokens, self.seconds = step, self.tokens + tokens, self.seconds + seconds
        return {
            "kind": "step",
            "step": step,
            "tokens": self.tokens,
            "loss": loss,
            "learning_rate": self.options.learning_rate * factor,
            "gate_learning_rate": self.options.gate_learning_rate * factor,
            "gradient_norm": norm,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "memory_tokens": int(max(tokens for _, tokens in gathered)),
            "gate_mean": self._gate_mean(),
        }

    def _accumulate_gradient(self, batch: Batch, targets: int, *, last: bool) -> Tensor:
        """Add this process's part of a batch to the gradient; give its part of the step's loss."""
        device = self.model.device
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
        if not self.model.memory.shared:
            self.model.memory.clear(batch.ends.nonzero().flatten().tolist())
        return loss.detach()

    def _gate_mean(self) -> float:
        gates = [torch.sigmoid(gate.detach()).flatten() for gate in self.model.side_network.gates]
        return float(torch.cat(gates).mean())

    def _diverged(self, step: int, what: str, value: float) -> TrainingError:
        path, _ = checkpoints.newest_checkpoint(self.output)
        kept = f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"
        return TrainingError(
            f"the {what} is {value} at step {step}; {kept}; train into another directory with "
            f"lower learning rates than learning_rate={self.options.learning_rate} and "
            f"gate_learning_rate={self.options.gate_learning_rate}"
        )

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    # ---------------------------------------------------------------- evaluation

    def _evaluate_if_due(
        self, log: TrainingLog, interrupts: Interrupts, progress: TrainingProgress
    ) -> None:
        due = self.step in (0, self.steps) or self._is_due(self.options.eval_every)
        if not due or not self._sample or log.evaluation(self.step) is not None:
            return
        progress.doing("evaluating")
        began = time.perf_counter()
        # Each process does all of it: layers in pieces need everybody at every segment. So none
        # may stop amid it either.
        alone = self._processes.count == 1
        check = interrupts.check if alone else lambda: None
        with self._processes.accelerator.autocast():
            found = measure_perplexities(
                self.model, self._sample, stride=self.stride, after_segment=check
            )
        if not all(math.isfinite(value) for value in (found.memory_on, found.memory_off)):
            raise self._diverged(self.step, "validation perplexity", found.memory_on)
        log.write(
            {
                "kind": "evaluation",
                "step": self.step,
                "tokens": self.tokens,
                "perplexity_memory_on": found.memory_on,
                "perplexity_memory_off": found.memory_off,
                "perplexity_backbone": found.backbone,
                "evaluated_tokens": found.tokens,
                "seconds": time.perf_counter() - began,
            }
        )
        progress.evaluated(found.memory_on, found.memory_off)
        progress.doing("training")

    # ---------------------------------------------------------------- saving, resuming

    def _save(self) -> Path:
        def check(name: str, weight: Tensor) -> None:
            if not bool(weight.isfinite().all()):
                raise self._diverged(self.step, f"weight {name}", math.nan)

        return self._state.save(
            self.output,
            step=self.step,
            progress={
                "tokens": self.tokens,
                "seconds": self.seconds,
                "data": self._batches.state_dict(),
            },
            keep=self.options.keep_checkpoints,
            check=check,
        )

    def _restore(self) -> None:
        checkpoints.check_same_settings(read_run(self.output), self._settings)
        path, problems = checkpoints.newest_checkpoint(self.output)
        for problem in problems:
            warnings.warn(f"{problem}; an older one is used", stacklevel=4)
        if path is None:
            return
        kept = self._state.restore(path)
        self._batches.load_state_dict(kept["data"])
        self.step, self.tokens, self.seconds = kept["step"], kept["tokens"], kept["seconds"]

    def _write_run(self, *, finished: bool, **results: Any) -> None:
        name = self.model.backbone.name_or_path
        write_run(self.output, self._settings, backbone_name=name, finished=finished, **results)

    def _finish(self, log: TrainingLog) -> TrainingResult:
        entry = log.evaluation(self.step)
        perplexities = None
        if entry is not None:
            perplexities = Perplexities(
                memory_on=entry["perplexity_memory_on"],
                memory_off=entry["perplexity_memory_off"],
                backbone=entry["perplexity_backbone"],
                tokens=entry["evaluated_tokens"],
            )
        main = self._processes.is_main
        self.model.save_pretrained(self.output, is_main_process=main)
        drawn = main and not plotting_problem()
        plot = plot_curves(self.output) if drawn else None
        if main:
            self._write_run(
                finished=True,
                results={
                    "steps": self.step,
                    "tokens": self.tokens,
                    "seconds": self.seconds,
                    "perplexities": None if perplexities is None else asdict(perplexities),
                },
            )
        self._processes.wait()
        return TrainingResult(
            output=self.output,
            log=log.path,
            plot=plot,
            steps=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            perplexities=perplexities,
        )


def _tokenized(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Sequence[TokenDocument]:
    if documents and isinstance(documents[0], TokenDocument):
        return cast("Sequence[TokenDocument]", documents)
    return tokenize_documents(cast("Sequence[Document]", documents), tokenizer)
