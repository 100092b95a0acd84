"""Adapt a backbone to books and measure what its memory brings, on books of other authors.

    python benchmarks/books.py --books FOLDER --output RUN [--steps 160] [--control]

FOLDER holds books_train.jsonl.gz and books_validation.jsonl.gz. RUN gets the trained side network
(RUN/memory), and results.json and results.md with every number: fresh segments and overlapping
windows, each condition over the same tokens, per book, by place in the window, with intervals.
``--control`` trains a second side network in the same way without memory, on the same tokens.
``--resume`` goes on where an interrupted run stopped, and trains nothing that is trained already.

The defaults are the run in docs/results.md: 160 steps of one 512-token segment, each book cut after
20,000 tokens or so, so that these steps read from four of them; five layers read memory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import memlayer
from memlayer.data import Document, TokenDocument, load_documents, tokenize_documents
from memlayer.evaluation import (
    PerplexityOptions,
    PerplexityResult,
    WindowReport,
    evaluate_perplexity,
    first_tokens,
)
from memlayer.training import TrainingOptions, train

if TYPE_CHECKING:
    from memlayer.backbones import Backbone


def main() -> None:
    """Parse, train, evaluate, write."""
    arguments = parse(sys.argv[1:])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device)
    names = ["memory", "control"] if arguments.control else ["memory"]
    books = training_books(arguments)
    trained = {name: adapt(arguments, backbone, books, output / name) for name in names}
    documents = evaluation_documents(arguments, backbone)
    evaluated = {
        name: evaluate(arguments, backbone, documents, output / name, control=name == "control")
        for name in names
    }
    results = {
        "arguments": vars(arguments),
        "threads": torch.get_num_threads(),
        "training": trained,
        "evaluation": {name: result.to_dict() for name, result in evaluated.items()},
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = markdown(arguments, trained, evaluated)
    (output / "results.md").write_text(text, encoding="utf-8")
    print(text)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    defaults, memory = TrainingOptions(), memlayer.LongMemConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--books", required=True, help="folder of books_{train,validation}.jsonl.gz"
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--control", action="store_true", help="also train without memory")
    parser.add_argument("--resume", action="store_true", help="go on with what RUN holds")

    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--gate-learning-rate", type=float, default=defaults.gate_learning_rate)
    parser.add_argument("--warmup", type=float, default=defaults.warmup)
    parser.add_argument("--train-characters", type=int, default=82_000, help="of each book")
    parser.add_argument("--train-eval-tokens", type=int, default=2048, help="for the curves")
    parser.add_argument("--memory-layers", type=int, nargs="+", default=[14, 16, 18, 20, 22])
    parser.add_argument("--reduction", type=int, default=memory.layer_reduction_factor)
    parser.add_argument("--side-init", default=memory.side_init)
    parser.add_argument("--memory-size", type=int, default=65_536)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=1)

    parser.add_argument("--documents", type=int, default=4, help="validation books, the first ones")
    parser.add_argument("--tokens", type=int, default=10_241, help="of each validation book")
    parser.add_argument("--stride", type=int, default=256, help="of the overlapping windows")
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=[65_536])
    parser.add_argument("--dense-context", type=int, default=2048, help="0: leave it out")
    parser.add_argument("--dense-stride", type=int, default=1536)
    return parser.parse_args(words)


def training_books(arguments: argparse.Namespace) -> list[Document]:
    """Give the beginnings of the training books."""
    books = load_documents([str(Path(arguments.books) / "books_train.jsonl.gz")], split="all")
    return [replace(book, text=book.text[: arguments.train_characters]) for book in books]


def evaluation_documents(arguments: argparse.Namespace, backbone: Backbone) -> list[TokenDocument]:
    """Give the beginnings of the first validation books."""
    path = Path(arguments.books) / "books_validation.jsonl.gz"
    books = load_documents([str(path)], split="all")[: arguments.documents]
    return first_tokens(
        tokenize_documents(books, backbone.tokenizer), arguments.tokens, backbone.tokenizer
    )


def adapt(
    arguments: argparse.Namespace, backbone: Backbone, books: list[Document], output: Path
) -> dict[str, Any]:
    """Train one side network; the one called ``control`` with its memory switched off."""
    summary = output / "summary.json"
    if arguments.resume and summary.exists():
        kept: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return kept
    config = memlayer.LongMemConfig(
        backend=arguments.backend,
        memory_size=arguments.memory_size,
        top_k=arguments.top_k,
        chunk_size=arguments.chunk_size,
        memory_layers=tuple(arguments.memory_layers),
        layer_reduction_factor=arguments.reduction,
        segment_length=arguments.segment_length,
        side_init=arguments.side_init,
    )
    options = TrainingOptions(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        gradient_accumulation=arguments.gradient_accumulation,
        learning_rate=arguments.learning_rate,
        gate_learning_rate=arguments.gate_learning_rate,
        warmup=arguments.warmup,
        seed=arguments.seed,
        eval_every=None,
        eval_tokens=arguments.train_eval_tokens,
    )
    validation = load_documents(
        [str(Path(arguments.books) / "books_validation.jsonl.gz")], split="all"
    )
    # Enough characters for the sample that draws the curves; whole books take long to tokenise.
    validation = [
        replace(book, text=book.text[: arguments.train_characters])
        for book in validation[: arguments.documents]
    ]
    model = memlayer.wrap(backbone.model, config)
    began = time.perf_counter()
    with model.disable_memory() if output.name == "control" else nullcontext():
        result = train(
            model,
            backbone.tokenizer,
            books,
            validation,
            options,
            output=output,
            resume=arguments.resume and (output / "training.json").exists(),
        )
    found = {**result.to_dict(), "wall_seconds": time.perf_counter() - began}
    summary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def evaluate(
    arguments: argparse.Namespace,
    backbone: Backbone,
    documents: list[TokenDocument],
    checkpoint: Path,
    *,
    control: bool,
) -> PerplexityResult:
    """Evaluate one side network; the control without memory, and without the bound again."""
    options = PerplexityOptions(
        stride=arguments.stride,
        memory_sizes=() if control else arguments.memory_sizes,
        dense_context=None if control else arguments.dense_context or None,
        dense_stride=arguments.dense_stride if arguments.dense_context and not control else None,
        seed=arguments.seed,
    )
    model = memlayer.load(checkpoint, backbone=backbone.model, backend=arguments.backend)
    return evaluate_perplexity(model, documents, options, progress=Countdown(checkpoint.name))


class Countdown:
    """Writes the time to go to standard error, once in half a minute."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = self.told = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """Take note of the tokens read."""
        now = time.perf_counter()
        if now - self.told > 30:
            self.told = now
            left = (now - self.began) * (total / done - 1)
            print(f"{self.name}: {done:,} of {total:,} tokens, {left:.0f} s to go", file=sys.stderr)


def markdown(
    arguments: argparse.Namespace,
    trained: dict[str, dict[str, Any]],
    evaluated: dict[str, PerplexityResult],
) -> str:
    """Give all numbers as a Markdown document."""
    settings = ", ".join(f"{key} {value}" for key, value in vars(arguments).items())
    lines = ["# Books", "", settings, ""]
    for name, run in trained.items():
        lines.append(
            f"- {name}: {run['tokens']:,} tokens in {run['steps']} steps, "
            f"{run['wall_seconds']:.0f} s with its evaluations"
        )
    for name, result in evaluated.items():
        lines += [
            "",
            f"## {name}: {result.tokens:,} scored tokens of "
            f"{len(result.overall.per_document)} books, {result.seconds:.0f} s",
        ]
        for report in filter(None, (result.fresh, result.overall)):
            lines += ["", f"### Windows every {report.stride} tokens", ""]
            lines += conditions(report)
            lines += ["", *intervals(report)]
            lines += ["", *by_document(report)]
            lines += ["", *by_position(report)]
    return "\n".join(lines) + "\n"


def conditions(report: WindowReport) -> list[str]:
    """Give the table of pooled scores."""
    backbone = report.conditions["backbone"].loss
    return table(
        ["condition", "perplexity", "bits per byte", "against backbone", "gap recovered"],
        [
            [
                name,
                f"{score.perplexity:.4f}",
                f"{score.bits_per_byte:.4f}",
                change(score.loss - backbone),
                "" if score.recovery is None else f"{100 * score.recovery:.1f} %",
            ]
            for name, score in report.conditions.items()
        ],
    )


def intervals(report: WindowReport) -> list[str]:
    """Give the table of 95 % intervals."""
    return table(
        ["condition", "against", "change", "from", "to", "over"],
        [
            [
                item.condition,
                item.against,
                change(item.difference),
                change(item.low),
                change(item.high),
                f"{item.units} {item.method}",
            ]
            for item in report.intervals
        ],
    )


def by_document(report: WindowReport) -> list[str]:
    """Give the table of documents."""
    names = list(report.conditions)
    return table(
        ["book", "tokens", *names],
        [
            [item.id, f"{item.tokens:,}", *(f"{item.perplexity[name]:.3f}" for name in names)]
            for item in report.per_document
        ],
    )


def by_position(report: WindowReport) -> list[str]:
    """Give the table of places in the window."""
    names = list(report.conditions)
    return table(
        ["tokens of local context", "tokens", *names],
        [
            [
                f"{item.start}-{item.end - 1}",
                f"{item.tokens:,}",
                *(f"{item.perplexity[name] or math.nan:.3f}" for name in names),
            ]
            for item in report.by_position
        ],
    )


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Give the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def change(difference: float | None) -> str:
    """Give a difference of mean losses as the change of perplexity."""
    return "" if difference is None else f"{100 * math.expm1(difference):+.2f} %"


if __name__ == "__main__":
    main()
