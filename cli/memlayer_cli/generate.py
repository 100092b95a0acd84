"""``memlayer generate``: go on from a prompt, reading a memory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from memlayer.completion import GenerationOptions
from memlayer_cli.json_output import STANDARD_OUTPUT, JsonOption, write_json
from memlayer_cli.model_options import (
    BackboneOption,
    BackendOption,
    BankOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    MemoryStorageOption,
    SegmentLengthOption,
    check_one_model,
)
from memlayer_cli.prompts import ChatOption, PromptFileOption, PromptOption, read_prompt
from memlayer_cli.session import Session

if TYPE_CHECKING:
    from memlayer.completion import Completion
    from memlayer.inspection import Inspection

OPTIONS = GenerationOptions()
SHOWN_SOURCES = 5

_PICKING_PANEL = "Picking tokens"


def generate(
    ctx: typer.Context,
    checkpoint: CheckpointOption = None,
    backbone: BackboneOption = None,
    bank: BankOption = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(help="Tokens to generate at most.", rich_help_panel=_PICKING_PANEL),
    ] = OPTIONS.max_new_tokens,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Take the likeliest token each time. Without this and the options below, tokens "
            "are picked as the model's own generation settings say.",
            rich_help_panel=_PICKING_PANEL,
        ),
    ] = OPTIONS.greedy,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample; below 1 likely tokens more often than the model says.",
            rich_help_panel=_PICKING_PANEL,
        ),
    ] = OPTIONS.temperature,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among the likeliest tokens that together have this probability.",
            rich_help_panel=_PICKING_PANEL,
        ),
    ] = OPTIONS.top_p,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample among this many of the likeliest tokens.", rich_help_panel=_PICKING_PANEL
        ),
    ] = OPTIONS.top_k,
    num_beams: Annotated[
        int,
        typer.Option(
            help="Beam search. Its text is shown at its end, since a beam may still lose.",
            rich_help_panel=_PICKING_PANEL,
        ),
    ] = OPTIONS.num_beams,
    seed: Annotated[
        int | None,
        typer.Option(help="Sample the same text each time.", rich_help_panel=_PICKING_PANEL),
    ] = OPTIONS.seed,
    no_memory: Annotated[
        bool,
        typer.Option("--no-memory", help="Do not read the bank, to see what it changes."),
    ] = False,
    show_sources: Annotated[
        bool,
        typer.Option(
            "--show-sources",
            help="Then list the passages that were read most to write the text, or the end of a "
            "text that is longer than a window.",
        ),
    ] = False,
    backend: BackendOption = None,
    segment_length: SegmentLengthOption = None,
    memory_storage: MemoryStorageOption = None,
    dtype: DtypeOption = "fp32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    r"""Let a model go on from a prompt, reading a memory.

    The text appears as it is made. The bank is read only: what is generated is
    not remembered.

    For example:

      memlayer generate --checkpoint run --bank novels.bank \
          --prompt "Marty South had" --show-sources

      memlayer generate --backbone smollm2-135m --bank novels.bank --chat \
          --prompt "Who is Marty South?" --temperature 0.7 --seed 1

      memlayer generate --checkpoint run --bank novels.bank --json - < prompt.txt
    """
    check_one_model(checkpoint, backbone)
    if show_sources and (no_memory or bank is None):
        raise typer.BadParameter("--show-sources needs --bank, and excludes --no-memory")
    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_beams=num_beams,
        seed=seed,
    )
    text = read_prompt(prompt, prompt_file)
    from memlayer.completion import complete
    from memlayer.inspection import InspectionOptions, inspect_completion
    from memlayer.loading import ModelNames, load_model
    from memlayer_cli.progress import loading

    session: Session = ctx.obj
    names = ModelNames(
        checkpoint=checkpoint,
        backbone=backbone,
        backend=backend,
        segment_length=segment_length,
        memory_storage=memory_storage,
        dtype=dtype,
        device=device,
    )
    with loading():
        loaded = load_model(names, bank=bank, remember=not no_memory, plugins=session.plugins)
    quiet = json == STANDARD_OUTPUT
    completion = complete(
        loaded.model,
        loaded.tokenizer,
        text,
        options,
        chat=chat,
        on_text=None if quiet else _write,
    )
    sources = None
    if show_sources:
        kept = InspectionOptions(passages=SHOWN_SOURCES)
        sources = inspect_completion(loaded.model, loaded.tokenizer, completion, kept)
    if json is not None:
        write_json(_to_dict(completion, sources), json)
    if not quiet:
        _show(completion, sources)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show(completion: Completion, sources: Inspection | None) -> None:
    from rich.console import Console

    from memlayer_cli.inspection_view import show_passages

    # What was counted goes to standard error: a text that is piped on stays the text alone.
    _write("\n")
    Console(stderr=True, highlight=False).print(
        f"{completion.new_tokens:,} tokens after {completion.prompt_tokens:,} of prompt in "
        f"{completion.seconds:.1f} s, {completion.tokens_per_second:.1f} a second",
        style="dim",
    )
    if sources is not None:
        show_passages(sources, Console(highlight=False))


def _to_dict(completion: Completion, sources: Inspection | None) -> dict[str, object]:
    found = completion.to_dict()
    if sources is not None:
        whole = sources.to_dict()
        found |= {"sources": {name: whole[name] for name in ("passages", "documents")}}
    return found
