"""``memlayer train``: adapt a backbone to read its memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memlayer.config import Fusion, LongMemConfig, MemoryStorage, SideInit
from memlayer.training.options import TrainingDtype, TrainingOptions
from memlayer_cli.json_output import JsonOption, write_json
from memlayer_cli.session import Session

if TYPE_CHECKING:
    from memlayer.training import TrainingResult

MODEL = LongMemConfig()
OPTIONS = TrainingOptions()
DEFAULT_DATA = "python-stdlib"


_MODEL_PANEL = "Model"
_TRAINING_PANEL = "Training"
_OUTPUT_PANEL = "Evaluation and checkpoints"


def train(
    ctx: typer.Context,
    backbone: Annotated[
        str,
        typer.Option(
            metavar="ID|DIR|FILE.gguf",
            help="Model to adapt: a Hub id, a directory, a GGUF file, or smollm2-135m.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the trained side network.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Training text: FILE, DIR, hf:NAME, python-docs or python-stdlib; may be "
            f"repeated. Default: {DEFAULT_DATA}.",
        ),
    ] = None,
    validation_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Validation text. Default: documents of --data, kept apart from training.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")
    ] = False,
    backend: Annotated[
        str,
        typer.Option(
            help="How memory is searched; see 'memlayer plugins'.", rich_help_panel=_MODEL_PANEL
        ),
    ] = MODEL.backend,
    segment_length: Annotated[
        int, typer.Option(help="Tokens of one forward.", rich_help_panel=_MODEL_PANEL)
    ] = MODEL.segment_length,
    memory_size: Annotated[
        int, typer.Option(help="Tokens each memory holds.", rich_help_panel=_MODEL_PANEL)
    ] = MODEL.memory_size,
    memory_storage: Annotated[
        MemoryStorage,
        typer.Option(
            help="Where stored keys and values lie: device, beside the model, or host, in main "
            "memory.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MODEL.memory_storage,
    top_k: Annotated[
        int, typer.Option(help="Tokens read back per token.", rich_help_panel=_MODEL_PANEL)
    ] = MODEL.top_k,
    chunk_size: Annotated[
        int, typer.Option(help="Tokens behind one index entry.", rich_help_panel=_MODEL_PANEL)
    ] = MODEL.chunk_size,
    memory_layer: Annotated[
        list[int] | None,
        typer.Option(
            help="Layer, from 0, whose keys and values are kept; may be repeated. Default: one, "
            "at 3/4 of the depth.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None,
    side_init: Annotated[
        SideInit,
        typer.Option(help="How the side network starts.", rich_help_panel=_MODEL_PANEL),
    ] = MODEL.side_init,
    fusion: Annotated[
        Fusion,
        typer.Option(
            help="How memory is mixed with local attention: one weight a head, or one softmax "
            "over both.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MODEL.fusion,
    recency_bias: Annotated[
        bool,
        typer.Option(
            help="Learn how much less old memories count.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MODEL.recency_bias,
    layer_reduction_factor: Annotated[
        int,
        typer.Option(help="Backbone layers per side layer.", rich_help_panel=_MODEL_PANEL),
    ] = MODEL.layer_reduction_factor,
    side_rank: Annotated[
        int | None,
        typer.Option(
            help="Train low-rank updates (LoRA) of the side layers, not whole copies. With "
            "--layer-reduction-factor 1: LoRA of the whole backbone, reading memory.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MODEL.side_rank,
    coupled: Annotated[
        bool,
        typer.Option(
            "--coupled",
            help="No side network: train copies of the memory layers alone (a control). Needs "
            "--layer-reduction-factor 1.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = MODEL.coupled,
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"Optimiser steps. Default: {OPTIONS.steps}, unless --tokens is given.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to train on, instead of --steps.", rich_help_panel=_TRAINING_PANEL
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Documents read side by side.", rich_help_panel=_TRAINING_PANEL),
    ] = OPTIONS.batch_size,
    gradient_accumulation: Annotated[
        int,
        typer.Option(help="Segments of each document per step.", rich_help_panel=_TRAINING_PANEL),
    ] = OPTIONS.gradient_accumulation,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the starts of two segments, which overlap if it is below "
            "--segment-length. Default: that.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = OPTIONS.stride,
    excerpt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a document to train on at a turn, from a random place. Default: all.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = OPTIONS.excerpt_tokens,
    lead_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens before an excerpt, at most, that are only memorized.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = OPTIONS.lead_tokens,
    memory_dropout: Annotated[
        float,
        typer.Option(
            help="Probability with which a segment is read without memory.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = OPTIONS.memory_dropout,
    learning_rate: Annotated[
        float, typer.Option(help="Peak, for weights.", rich_help_panel=_TRAINING_PANEL)
    ] = OPTIONS.learning_rate,
    gate_learning_rate: Annotated[
        float,
        typer.Option(
            help="Peak, for gates, slopes, layer scales.", rich_help_panel=_TRAINING_PANEL
        ),
    ] = OPTIONS.gate_learning_rate,
    warmup: Annotated[
        float,
        typer.Option(
            help="Part of the steps in which learning rates rise.", rich_help_panel=_TRAINING_PANEL
        ),
    ] = OPTIONS.warmup,
    dtype: Annotated[
        TrainingDtype,
        typer.Option(help="Precision of the arithmetic.", rich_help_panel=_TRAINING_PANEL),
    ] = OPTIONS.dtype,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory, more time: side layers run twice.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = OPTIONS.gradient_checkpointing,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the layers that memory does not reach into.",
            rich_help_panel=_TRAINING_PANEL,
        ),
    ] = OPTIONS.compile,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_TRAINING_PANEL),
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(help="Of document order and dropout.", rich_help_panel=_TRAINING_PANEL),
    ] = OPTIONS.seed,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations.", rich_help_panel=_OUTPUT_PANEL),
    ] = OPTIONS.eval_every,
    eval_tokens: Annotated[
        int,
        typer.Option(help="Validation tokens scored each time.", rich_help_panel=_OUTPUT_PANEL),
    ] = OPTIONS.eval_tokens,
    eval_documents: Annotated[
        int,
        typer.Option(help="Validation documents they are from.", rich_help_panel=_OUTPUT_PANEL),
    ] = OPTIONS.eval_documents,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.", rich_help_panel=_OUTPUT_PANEL),
    ] = OPTIONS.save_every,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Tracker that gets what the log gets: tensorboard, wandb, ...; may be repeated.",
            rich_help_panel=_OUTPUT_PANEL,
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    r"""Train a side network that reads a frozen backbone's memory.

    Writes the side network (for memlayer.load), log.jsonl, curves.png,
    training.json and checkpoints/ into --output. Ctrl-C saves a checkpoint;
    the same command with --resume goes on from it.

    For example:

      memlayer train --backbone smollm2-135m --segment-length 512 --output run

      memlayer train --backbone gpt2-medium --backend faiss-gpu \
          --data books/ --tokens 10000000 --output run

      memlayer train --backbone gpt2-medium --backend faiss-gpu \
          --data books/ --tokens 10000000 --output run --resume
    """
    config = LongMemConfig(
        backend=backend,
        segment_length=segment_length,
        memory_size=memory_size,
        memory_storage=memory_storage,
        top_k=top_k,
        chunk_size=chunk_size,
        memory_layers=tuple(memory_layer) if memory_layer else None,
        side_init=side_init,
        fusion=fusion,
        recency_bias=recency_bias,
        layer_reduction_factor=layer_reduction_factor,
        side_rank=side_rank,
        coupled=coupled,
    )
    options = TrainingOptions(
        steps=OPTIONS.steps if steps is None and tokens is None else steps,
        tokens=tokens,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        stride=stride,
        excerpt_tokens=excerpt_tokens,
        lead_tokens=lead_tokens,
        memory_dropout=memory_dropout,
        learning_rate=learning_rate,
        gate_learning_rate=gate_learning_rate,
        warmup=warmup,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        seed=seed,
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        eval_documents=eval_documents,
        save_every=save_every,
        report_to=tuple(report_to or ()),
    )
    from memlayer.training import train_from_names
    from memlayer.training.processes import is_main_process

    session: Session = ctx.obj
    result = train_from_names(
        backbone,
        data or [DEFAULT_DATA],
        config,
        options,
        output=output,
        validation_data=validation_data or (),
        device=device,
        resume=resume,
        plugins=session.plugins,
    )
    if not is_main_process():
        return
    if json is not None:
        write_json(result.to_dict(), json)
    if json != "-":
        _show(result)


def _show(result: TrainingResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from memlayer.training.plot import plotting_problem

    console = Console(highlight=False)
    found = result.perplexities
    if found is None:
        console.print("no validation documents, so nothing was evaluated; see --validation-data")
    else:
        table = Table(title=f"validation perplexity over the same {found.tokens:,} tokens")
        table.add_column("model")
        table.add_column("perplexity", justify="right")
        table.add_column("against backbone", justify="right")
        for name, value in (
            ("backbone alone", found.backbone),
            ("side network, memory off", found.memory_off),
            ("side network, memory on", found.memory_on),
        ):
            change = f"{100 * (value / found.backbone - 1):+.2f} %"
            table.add_row(name, f"{value:.3f}", "" if name == "backbone alone" else change)
        console.print(table)
    lines = [
        f"trained on {result.tokens:,} tokens in {result.steps:,} steps, {result.seconds:.0f} s",
        f"checkpoint: {result.output}",
        f"plot: {result.plot}" if result.plot else f"plot: {plotting_problem()}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
