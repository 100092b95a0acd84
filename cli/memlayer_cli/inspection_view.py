"""An inspection, and the passages of one, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from memlayer.inspection import Inspection, Passage, TokenReading

_HELPED = "green"
_COST = "red"
_STRONG_BITS = 0.1
_SHOWN_TOKENS = 8


def show_inspection(inspection: Inspection, console: Console) -> None:
    """Print the text coloured by what memory changed, tokens, passages, heads and documents."""
    from rich.panel import Panel

    console.print(Panel(_coloured(inspection), title=_title(inspection), title_align="left"))
    scored = sum(token.gain is not None for token in inspection.tokens)
    console.print(
        f"memory {'saved' if inspection.gain >= 0 else 'cost'} {abs(inspection.gain):.2f} bits "
        f"over {scored:,} tokens (green: it helped, red: it did not)"
    )
    if not inspection.passages:
        console.print("nothing was read: the memory is empty")
        return
    console.print(_most_helped(inspection))
    show_passages(inspection, console)
    console.print(_heads(inspection))
    console.print(_documents(inspection))


def show_passages(inspection: Inspection, console: Console) -> None:
    """Print the passages that were read most, what was retrieved in bold."""
    from rich.padding import Padding
    from rich.text import Text

    generated = inspection.prompt_tokens < len(inspection.tokens)
    console.print(Text("read most to write this:" if generated else "read most:", style="bold"))
    if not inspection.passages:
        console.print("nothing: the memory is empty")
    for number, passage in enumerate(inspection.passages, start=1):
        where = [
            passage.document or "(no name)",
            *([] if passage.offset < 0 else [f"token {passage.offset:,}"]),
            f"{passage.distance:,} tokens back",
            f"{100 * passage.weight:.2f} % of all reading",
        ]
        console.print(Text.assemble((f"{number:>2}. ", "bold"), " · ".join(where)))
        console.print(Padding(_quote(passage), (0, 0, 0, 4)))


def _title(inspection: Inspection) -> str:
    generated = len(inspection.tokens) - inspection.prompt_tokens
    more = f" and {generated:,} generated" if generated else ""
    return f"{inspection.prompt_tokens:,} tokens of prompt{more}"


def _coloured(inspection: Inspection) -> Text:
    from rich.text import Text

    text = Text()
    for number, token in enumerate(inspection.tokens):
        style = "italic " if number >= inspection.prompt_tokens else ""
        if token.gain is not None and abs(token.gain) >= _STRONG_BITS:
            style += _HELPED if token.gain > 0 else _COST
        text.append(token.text, style=style.strip() or None)
    return text


def _most_helped(inspection: Inspection) -> Table:
    from rich.text import Text

    chunks = {passage.chunks[0]: passage for passage in inspection.chunks}
    table = _table("tokens that memory helped most", "token", "with", "without", "bits")
    table.add_column("read most just before it", overflow="fold")
    for number in _by_gain(inspection.tokens)[:_SHOWN_TOKENS]:
        token, reader = inspection.tokens[number], inspection.tokens[number - 1]
        assert token.with_memory is not None
        assert token.without_memory is not None
        assert token.gain is not None
        table.add_row(
            Text(repr(token.text)),
            f"{100 * token.with_memory:.1f} %",
            f"{100 * token.without_memory:.1f} %",
            f"{token.gain:+.2f}",
            _quote(chunks[reader.reads[0].chunk], around=24) if reader.reads else "",
        )
    return table


def _by_gain(tokens: Sequence[TokenReading]) -> list[int]:
    scored = [number for number, token in enumerate(tokens) if token.gain is not None]
    return sorted(scored, key=lambda number: -(tokens[number].gain or 0.0))


def _heads(inspection: Inspection) -> Table:
    classes = [f"<{_short(edge)}" for edge in inspection.distance_edges[1:]]
    table = _table("heads: gate, and % of reading by tokens back", "head", "gate", *classes)
    for head in inspection.heads:
        shares = [f"{100 * share:.0f}" if share >= 0.005 else "" for share in head.by_distance]
        table.add_row(f"{head.layer}.{head.head}", f"{head.gate:.2f}", *shares)
    return table


def _documents(inspection: Inspection) -> Table:
    from rich.text import Text

    table = _table("documents", "document", "share of reading", "chunks")
    for item in inspection.documents:
        name = Text(item.document or "(no name)")
        table.add_row(name, f"{100 * item.weight:.1f} %", f"{item.chunks:,}")
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _quote(passage: Passage, around: int | None = None) -> Text:
    """Give a passage in running lines, what was retrieved in bold.

    Args:
        passage: to show.
        around: characters shown on either side of what was retrieved; None: all.
    """
    from rich.text import Text

    if passage.text is None:
        return Text("(its text was not kept)")
    first, last = passage.marks[0][0], passage.marks[-1][1]
    at = 0 if around is None else max(first - around, 0)
    end_of_text = len(passage.text) if around is None else last + around
    text = Text("…")
    for start, end in passage.marks:
        text.append(_flat(passage.text[at:start]))
        text.append(_flat(passage.text[start:end]), style="bold underline")
        at = end
    text.append(_flat(passage.text[at:end_of_text]))
    return text.append("…")


def _flat(text: str) -> str:
    return text.replace("\n", " ")
