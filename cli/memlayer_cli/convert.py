"""``memlayer convert``: checkpoints of other projects into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memlayer.config import LongMemConfig

convert = typer.Typer(no_args_is_help=True, help="Convert another project's checkpoint.")

DEFAULTS = LongMemConfig()


@convert.callback()
def _group() -> None:
    """Keep the command's name, however few there are."""


@convert.command()
def longmem(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="A fairseq .pt file, or .safetensors.")
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Gets the side network, and the backbone in backbone/."),
    ],
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With fairseq's dict.txt, encoder.json and vocab.bpe. Default: no tokenizer.",
        ),
    ] = None,
    memory_layer: Annotated[
        int | None,
        typer.Option(
            help="Backbone layer, from 0, whose keys and values are kept. Default: as the file "
            "says, else the last that the reading side layer stands for."
        ),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(help="Tokens behind one index entry. Default: as the file says, else 4."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Tokens read back per token. Default: as the file says, else 64."),
    ] = None,
    memory_size: Annotated[
        int, typer.Option(help="Tokens that memory holds.")
    ] = DEFAULTS.memory_size,
    segment_length: Annotated[
        int, typer.Option(help="Tokens of a window.")
    ] = DEFAULTS.segment_length,
) -> None:
    r"""Convert a checkpoint of LongMem's own code.

    The file is read as tensors and plain values; no code in it is run.

    For example:

      memlayer convert longmem checkpoint.pt --output longmem --vocabulary gpt2_bpe
    """
    from memlayer.longmem import ReleasedSettings, convert_longmem
    from memlayer_cli.progress import loading

    settings = ReleasedSettings(
        memory_layer=memory_layer,
        chunk_size=chunk_size,
        top_k=top_k,
        memory_size=memory_size,
        segment_length=segment_length,
    )
    with loading("converting"):
        model = convert_longmem(checkpoint, output, settings, vocabulary)
    memory = model.memory_config
    (layer,) = memory.memory_layers or ()
    backbone = sum(parameter.numel() for parameter in model.backbone.parameters())
    side = sum(parameter.numel() for parameter in model.trainable_parameters())
    typer.echo(
        f"{output}: a backbone of {backbone:,} weights and a side network of {side:,}; memory is "
        f"read from layer {layer}, {memory.top_k} tokens in chunks of {memory.chunk_size}"
    )
    if vocabulary is None:
        typer.echo("it has no tokenizer: give --vocabulary to use it on text")
