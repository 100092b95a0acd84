"""The training loop.

    Trainer.run ── step after step, see step.py ─► log
                └─ now and then: evaluate, write a checkpoint; at the end: save the side network

Everything that a step depends on is in a checkpoint (weights, AdamW's moments, random generators,
the place in the data, every stream's memory), so that a resumed run repeats the interrupted one.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from memlayer.data import Document, StreamBatches, TokenDocument, tokenize_documents
from memlayer.errors import ConfigError
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
from memlayer.training.state import TrainingState
from memlayer.training.step import Stepper
from memlayer.training.trackers import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        tokens: tokens trained on in them.
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
            excerpt=options.excerpt_tokens,
            lead=options.lead_tokens,
            seed=options.seed,
            repeat=True,
        )
        self._sample = validation_sample(
            validation, tokens=options.eval_tokens, count=options.eval_documents
        )
        if validation:
            check_sample(self._sample, self.segment_length, options)
        self._processes = Processes(options, model.device, self.output)
        if options.lead_tokens and self._processes.sharded:
            raise ConfigError(
                f"lead_tokens={options.lead_tokens} needs the whole model in every process, whose "
                "rows begin excerpts at different steps; train under DDP instead of FSDP"
            )
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
        forward = self._processes.prepare(model)
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._stepper = Stepper(
            model,
            forward,
            self._batches,
            self._processes,
            options,
            steps=self.steps,
            output=self.output,
        )
        self._memory = model.new_memory(overlap=self.segment_length - self.stride)
        self._state = TrainingState(
            parameters=parameters,
            optimizer=self._stepper.optimizer,
            memory=self._memory,
            processes=self._processes,
        )

    def run(self) -> TrainingResult:
        """Train to the end, or until Ctrl-C."""
        device = self.model.device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self._remembering_streams(),
        ):
            torch.manual_seed(self.options.seed + self._processes.index)
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
        return self._finish(log)

    @contextmanager
    def _remembering_streams(self) -> Iterator[None]:
        """Let the model have the streams' memory inside the block, and its own, empty, after it."""
        own = self.model.memory
        own.clear()
        self.model.memory = self._memory
        try:
            yield
        finally:
            self.model.memory = own

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
        done = self._stepper.take(self.step + 1)
        self.step += 1
        self.tokens += done.tokens
        self.seconds += done.seconds
        return {"kind": "step", "step": self.step, "tokens": self.tokens, **done.scores}

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
            raise self._stepper.diverged(self.step, "validation perplexity", found.memory_on)
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
                raise self._stepper.diverged(self.step, f"weight {name}", math.nan)

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
