"""``memlayer memorize``: documents into a bank on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memlayer_cli.json_output import STANDARD_OUTPUT, JsonOption, write_json
from memlayer_cli.model_options import (
    BackboneOption,
    BackendOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    MemoryStorageOption,
    SegmentLengthOption,
    check_one_model,
)
from memlayer_cli.session import Session

if TYPE_CHECKING:
    from memlayer.ingestion import MemorizedDocument, MemorizeReport

# The library's default; importing it from there would import torch.
SAVE_EVERY = 16


def memorize(
    ctx: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Text: FILE, DIR, hf:NAME, python-docs or python-stdlib; all of their documents.",
        ),
    ],
    bank: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The bank's directory; made if need be, else added to."),
    ],
    checkpoint: CheckpointOption = None,
    backbone: BackboneOption = None,
    memory_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the bank holds before it drops the oldest. Default: as it is, for a "
            "new bank the checkpoint's.",
            rich_help_panel="Model",
        ),
    ] = None,
    memory_layer: Annotated[
        list[int] | None,
        typer.Option(
            help="With --backbone: layer, from 0, whose keys and values are kept; may be repeated. "
            "Default: as the bank, for a new one the layer at 3/4 of the depth.",
            rich_help_panel="Model",
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Segments between two saves: what a kill can lose.")
    ] = SAVE_EVERY,
    backend: BackendOption = None,
    segment_length: SegmentLengthOption = None,
    memory_storage: MemoryStorageOption = None,
    dtype: DtypeOption = "fp32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    r"""Read documents into a memory bank on disk.

    A document that the bank holds already is not read again; one that was cut
    off goes on from there. Ctrl-C, or a kill, leaves a whole bank with what
    was saved last; the same command goes on.

    For example:

      memlayer memorize --checkpoint run --bank novels.bank moby-dick.txt

      memlayer memorize --checkpoint run --bank novels.bank novels/

      memlayer memorize --backbone smollm2-135m --memory-layer 20 \
          --memory-size 131072 --bank novels.bank moby-dick.txt
    """
    check_one_model(checkpoint, backbone)
    from memlayer.ingestion.run import memorize_from_names
    from memlayer.loading import ModelNames
    from memlayer_cli.progress import progress_bar

    names = ModelNames(
        checkpoint=checkpoint,
        backbone=backbone,
        backend=backend,
        memory_size=memory_size,
        memory_layers=tuple(memory_layer) if memory_layer else None,
        segment_length=segment_length,
        memory_storage=memory_storage,
        dtype=dtype,
        device=device,
    )
    session: Session = ctx.obj
    with progress_bar("memorizing") as bar:
        report = memorize_from_names(
            files,
            bank,
            names,
            save_every=save_every,
            progress=lambda step: bar(step.saved, step.tokens, step.name),
            plugins=session.plugins,
        )
    if json is not None:
        write_json(report.to_dict(), json)
    if json != STANDARD_OUTPUT:
        _show(report)


def _show(report: MemorizeReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    table = Table("document")
    table.add_column("tokens", justify="right")
    table.add_column("what was done")
    for document in report.documents:
        table.add_row(Text(document.name), f"{document.tokens:,}", _what_was_done(document))
    console.print(table)
    console.print(
        f"read {report.memorized:,} tokens; {report.bank} holds {report.length:,}", soft_wrap=True
    )


def _what_was_done(document: MemorizedDocument) -> str:
    return {
        "new": "new: read",
        "held": "held already",
        "continued": f"continued from token {document.tokens - document.memorized:,}",
    }[document.outcome]
