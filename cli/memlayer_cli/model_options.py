"""The options that name a model, the same for every command that reads or fills a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memlayer.config import MemoryStorage

_PANEL = "Model"

CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="DIR",
        help="Trained side network: a directory or a Hub id.",
        rich_help_panel=_PANEL,
    ),
]

BackboneOption = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="ID|DIR|FILE.gguf",
        help="Backbone with a side network that nobody trained, instead of --checkpoint.",
        rich_help_panel=_PANEL,
    ),
]

BareBackboneOption = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="ID|DIR|FILE.gguf",
        help="Backbone to evaluate alone, instead of --checkpoint.",
        rich_help_panel=_PANEL,
    ),
]

BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="How memory is searched, instead of the checkpoint's; see 'memlayer plugins'.",
        rich_help_panel=_PANEL,
    ),
]

SegmentLengthOption = Annotated[
    int | None,
    typer.Option(
        "--segment-length",
        help="With --backbone: tokens of a window.",
        rich_help_panel=_PANEL,
    ),
]

MemoryStorageOption = Annotated[
    MemoryStorage | None,
    typer.Option(
        "--memory-storage",
        help="Where stored keys and values lie: device, beside the model, or host, in main memory. "
        "Default: the checkpoint's.",
        rich_help_panel=_PANEL,
    ),
]

DtypeOption = Annotated[
    str,
    typer.Option("--dtype", help="Of the backbone: fp32 or bf16.", rich_help_panel=_PANEL),
]

DeviceOption = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_PANEL),
]

BankOption = Annotated[
    Path | None,
    typer.Option(
        "--bank", metavar="DIR", help="What the model remembers: a bank of 'memlayer memorize'."
    ),
]


def check_one_model(checkpoint: str | None, backbone: str | None) -> None:
    """Refuse a command line that names no model, or two."""
    if (checkpoint is None) == (backbone is None):
        raise typer.BadParameter("give either --checkpoint or --backbone")
