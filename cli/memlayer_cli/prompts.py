"""Where a command's prompt comes from: an option, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_PANEL = "Prompt"

PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEXT", help="The prompt.", rich_help_panel=_PANEL),
]

PromptFileOption = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file",
        metavar="FILE",
        help="A text file that holds the prompt; - for standard input, which is also read when it "
        "is a pipe and no prompt is given.",
        rich_help_panel=_PANEL,
    ),
]

ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat",
        help="Put the prompt into the tokenizer's chat template, as a user's message, instead of "
        "going on from it.",
        rich_help_panel=_PANEL,
    ),
]


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Give the prompt's text.

    A file's last line break is no part of it: an editor puts it there, and a model would go on in a
    new line.
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("--prompt and --prompt-file exclude each other")
    if prompt is not None:
        text = prompt
    elif prompt_file is not None and str(prompt_file) != "-":
        from memlayer.data.files import read_text

        text = read_text(prompt_file).removesuffix("\n")
    elif prompt_file is not None or not sys.stdin.isatty():
        text = _read_standard_input().removesuffix("\n")
    else:
        raise typer.BadParameter("there is no prompt; give --prompt, --prompt-file or a pipe")
    if not text.strip():
        raise typer.BadParameter("the prompt is empty; give it some text")
    return text


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not text: {error}") from error
