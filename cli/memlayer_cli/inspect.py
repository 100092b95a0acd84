"""``memlayer inspect``: what a bank holds, or what a prompt's tokens look up in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memlayer.completion import GenerationOptions
from memlayer.inspection import InspectionOptions
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

OPTIONS = InspectionOptions()


def inspect(
    ctx: typer.Context,
    checkpoint: CheckpointOption = None,
    backbone: BackboneOption = None,
    bank: BankOption = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let the model go on for N tokens, and inspect these too. The likeliest ones, "
            "unless an option below says to sample.",
        ),
    ] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample; below 1 likely tokens more often than the model says."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest tokens that together have this probability."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sample the same text each time.")] = None,
    passages: Annotated[
        int, typer.Option(help="Passages to list of those that were read most.")
    ] = OPTIONS.passages,
    context: Annotated[
        int, typer.Option(help="Tokens of text to show on either side of what was retrieved.")
    ] = OPTIONS.context,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all of it as one HTML page that needs no network."
        ),
    ] = None,
    backend: BackendOption = None,
    segment_length: SegmentLengthOption = None,
    memory_storage: MemoryStorageOption = None,
    dtype: DtypeOption = "fp32",
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    r"""Show what a bank holds, or what a prompt's tokens look up in it.

    With a model and a prompt: which passages each token retrieved, with scores
    and gates, and which tokens memory helped. A page (--html) shows most.

    For example:

      memlayer inspect --bank novels.bank

      memlayer inspect --checkpoint run --bank novels.bank \
          --prompt "Marty South had" --html page.html

      memlayer inspect --backbone smollm2-135m --bank novels.bank \
          --prompt "Marty South had" --max-new-tokens 40 --json -
    """
    if checkpoint is None and backbone is None:
        _inspect_bank(bank, [prompt, prompt_file, html, max_new_tokens or None], json)
        return
    check_one_model(checkpoint, backbone)
    options = InspectionOptions(passages=passages, context=context)
    picking = _picking(max_new_tokens, temperature, top_p, seed)
    text = read_prompt(prompt, prompt_file)
    from memlayer.completion import complete, encode_prompt
    from memlayer.inspection import inspect_completion, inspect_tokens, write_page
    from memlayer.inspection.page import check_page_path
    from memlayer.loading import ModelNames, load_model
    from memlayer_cli.progress import loading

    if html is not None:
        check_page_path(html)
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
        loaded = load_model(names, bank=bank, plugins=session.plugins)
        model, tokenizer = loaded.model, loaded.tokenizer
        if picking is not None:
            written = complete(model, tokenizer, text, picking, chat=chat)
            found = inspect_completion(model, tokenizer, written, options)
        else:
            ids = encode_prompt(tokenizer, text, chat=chat)
            found = inspect_tokens(model, tokenizer, ids, options=options)
    if html is not None:
        write_page(found, html)
    if json is not None:
        write_json(found.to_dict(), json)
    if json != STANDARD_OUTPUT:
        from rich.console import Console

        from memlayer_cli.inspection_view import show_inspection

        console = Console(highlight=False)
        show_inspection(found, console)
        if html is not None:
            console.print(f"page: {html}", soft_wrap=True, markup=False)


def _picking(
    tokens: int, temperature: float | None, top_p: float | None, seed: int | None
) -> GenerationOptions | None:
    samples = any(value is not None for value in (temperature, top_p, seed))
    if tokens:
        return GenerationOptions(
            max_new_tokens=tokens,
            greedy=not samples,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    if samples:
        raise typer.BadParameter("--temperature, --top-p and --seed need --max-new-tokens")
    return None


def _inspect_bank(bank: Path | None, others: list[object], json: str | None) -> None:
    if bank is None:
        raise typer.BadParameter("give --bank, or a model (--checkpoint, --backbone) and a prompt")
    if any(other is not None for other in others):
        raise typer.BadParameter(
            "a prompt needs a model: give --checkpoint or --backbone, or --bank alone"
        )
    from memlayer.memory.store import bank_info
    from memlayer_cli.bank import show_bank

    found = bank_info(bank)
    if json is not None:
        write_json(found.to_dict(), json)
    if json != STANDARD_OUTPUT:
        show_bank(found)
