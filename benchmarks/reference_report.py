"""Evaluate what benchmarks/reference.py trained, by domain, and print the tables.

    python benchmarks/reference_report.py --data FOLDER --run RUN --split validation

Every condition in RUN is scored on the same tokens of the same documents: ``memory`` with its
memory on and off and with another document's, ``control`` without memory, ``lora`` as a plain
backbone, ``lora_memory`` as ``memory``; the ``tuned`` ones likewise, around their own backbone.
With --dense-context the bare backbone and LoRA are scored with so much context, too. With --against
another RUN the same evaluations there, which have to be made already, are compared as well.
RUN/evaluation gets a JSON file for each condition, domain and setting; one that is there already is
not made again, so that the command can be given again, or on another machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from reference import CONDITIONS, DOMAINS

import memlayer
from memlayer.data import load_documents, tokenize_documents
from memlayer.evaluation import PerplexityOptions, evaluate_perplexity, first_tokens
from memlayer.evaluation.results import recovery
from memlayer.evaluation.statistics import paired_interval

if TYPE_CHECKING:
    from memlayer.backbones import Backbone
    from memlayer.data import TokenDocument

Result = dict[str, Any]
PREFIXES = {"lora": "LoRA, ", "tuned": "tuned, "}
BACKBONES = {"lora": "LoRA", **dict.fromkeys(("tuned", "tuned_memory", "tuned_control"), "tuned")}
"""What the backbone of a condition's evaluation is called, if it is not the bare one."""


def main() -> None:
    """Parse, evaluate what is missing, print."""
    arguments = parse(sys.argv[1:])
    backbone = memlayer.load_backbone(
        arguments.backbone, dtype=arguments.dtype, device=arguments.device
    )
    folder = Path(arguments.run) / "evaluation"
    folder.mkdir(exist_ok=True)
    results: dict[str, dict[str, Result]] = {}
    others: dict[str, dict[str, Result]] = {}
    for domain in arguments.domains:
        documents = read_documents(arguments, domain, backbone)
        for condition in arguments.conditions:
            if not (Path(arguments.run) / condition).is_dir():
                continue
            place = folder / f"{condition}-{domain}-{name_of(arguments, condition)}.json"
            if not place.exists():
                result = evaluated(arguments, backbone, condition, documents)
                place.write_text(json.dumps(result) + "\n", encoding="utf-8")
            results.setdefault(domain, {})[condition] = json.loads(place.read_text())
            print(f"{place.stem}: {perplexities(results[domain][condition])}", file=sys.stderr)
            if arguments.against is not None:
                other = Path(arguments.against) / "evaluation" / place.name
                others.setdefault(domain, {})[condition] = json.loads(other.read_text())
    print("\n".join(lines_of(results)))
    if others:
        print("\n".join(("", *compared(results, others))))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS), choices=DOMAINS)
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS, choices=CONDITIONS)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=["bf16", "fp32"])
    parser.add_argument("--documents", type=int, default=4, help="of each domain, at most")
    parser.add_argument("--tokens", type=int, default=4097, help="of each document, the first ones")
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=[65_536])
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--stride", type=int, default=0, help="of overlapping windows; 0: none")
    parser.add_argument("--dense-context", type=int, default=0, help="0: leave it out")
    parser.add_argument("--dense-stride", type=int, default=0, help="0: a segment")
    parser.add_argument("--against", metavar="RUN", help="what was trained in another way")
    return parser.parse_args(words)


def name_of(arguments: argparse.Namespace, condition: str) -> str:
    """Name the tokens that are scored, and with what."""
    stride = arguments.stride or arguments.segment_length
    name = f"{arguments.split}-{arguments.documents}x{arguments.tokens}-{stride}"
    if condition.endswith("memory"):
        name += "".join(f"-m{size}" for size in arguments.memory_sizes)
    if dense_context(arguments, condition):
        name += f"-d{arguments.dense_context}-{arguments.dense_stride}"
    return name


def dense_context(arguments: argparse.Namespace, condition: str) -> int | None:
    """Give the dense context to score: of LoRA, and by one condition of the backbone of all."""
    first = next((name for name in ("memory", "lora_memory") if name in arguments.conditions), None)
    return (arguments.dense_context or None) if condition in ("lora", first) else None


def read_documents(
    arguments: argparse.Namespace, domain: str, backbone: Backbone
) -> list[TokenDocument]:
    """Give the beginnings of the first documents that are at least half as long as wanted."""
    path = Path(arguments.data) / domain / f"{domain}_{arguments.split}.jsonl.gz"
    texts = [
        replace(document, text=document.text[: 8 * arguments.tokens])
        for document in load_documents([str(path)], split="all")
    ]
    documents = first_tokens(
        tokenize_documents(texts, backbone.tokenizer), arguments.tokens, backbone.tokenizer
    )
    long = [document for document in documents if 2 * len(document.input_ids) >= arguments.tokens]
    return long[: arguments.documents]


def evaluated(
    arguments: argparse.Namespace,
    backbone: Backbone,
    condition: str,
    documents: list[TokenDocument],
) -> Result:
    """Score one condition."""
    memory = condition.endswith("memory")
    dense = dense_context(arguments, condition)
    options = PerplexityOptions(
        segment_length=arguments.segment_length,
        stride=arguments.stride or arguments.segment_length,
        fresh=False,
        memory_sizes=arguments.memory_sizes if memory else [],
        foreign_memory=memory and len(documents) > 1,
        dense_context=dense,
        dense_stride=(arguments.dense_stride or None) if dense else None,
        resamples=1000,
    )
    folder = Path(arguments.run) / condition
    plain = condition in ("lora", "tuned")
    if plain or condition.startswith("tuned"):
        adapter = folder if plain else folder.with_name("tuned")
        backbone = memlayer.load_backbone(
            str(adapter), dtype=arguments.dtype, device=arguments.device
        )
    model: Any = backbone.model
    if not plain:
        model = memlayer.load(folder / "small", backbone=model, backend="torch")
    return evaluate_perplexity(model, documents, options).to_dict()


def perplexities(result: Result) -> dict[str, float]:
    """Give a result's perplexities by condition."""
    return {name: round(value["perplexity"], 4) for name, value in result["conditions"].items()}


def lines_of(results: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    """Give tables: perplexities, differences with their intervals, what of dense is recovered."""
    merged = {domain: dict(conditions_of(result)) for domain, result in results.items()}
    names = list(dict.fromkeys(name for columns in merged.values() for name in columns))
    yield "| domain | documents | tokens | " + " | ".join(names) + " |"
    yield "|" + " --- |" * (3 + len(names))
    for domain, columns in merged.items():
        some = next(iter(columns.values()))
        tokens = sum(one for one, _ in some.values())
        cells = [f"{pooled(columns[name]):.2f}" if name in columns else "" for name in names]
        yield f"| {domain} | {len(some)} | {tokens} | " + " | ".join(cells) + " |"
    yield ""
    yield "| domain | condition | against | change of perplexity | 95 % interval over documents |"
    yield "| --- | --- | --- | --- | --- |"
    sizes = [name for name in names if re.search(r"memory \d+$", name)]
    # The largest of each network, against whatever is no memory of that network.
    largest = {re.sub(r"memory \d+$", "", name): name for name in sizes}
    foreign = [name for name in names if name.endswith("foreign memory")]
    for domain, columns in merged.items():
        for name, against in (
            *((name, other) for name in largest.values() for other in names if other != name),
            *((name, other) for name in foreign for other in names if other not in foreign + sizes),
        ):
            if name in columns and against in columns:
                yield f"| {domain} | {name} | {against} | {change(columns[name], columns[against])}"
    if {"dense", "LoRA, dense"} & set(names):
        yield ""
        yield from recovered(merged)


def compared(
    results: Mapping[str, Mapping[str, Result]], others: Mapping[str, Mapping[str, Result]]
) -> Iterator[str]:
    """Give a table of the same conditions trained in two ways, where that makes a difference."""
    yield "| domain | condition | here | there | change of perplexity | 95 % interval |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for domain, result in results.items():
        there = dict(conditions_of(others[domain]))
        for name, here in conditions_of(result):
            if here != there[name]:
                both = f"{pooled(here):.2f} | {pooled(there[name]):.2f}"
                yield f"| {domain} | {name} | {both} | {change(here, there[name])}"


def recovered(
    results: Mapping[str, Mapping[str, Mapping[str, tuple[int, float]]]],
) -> Iterator[str]:
    """Give a table of how much of what dense context gains each condition gains.

    LoRA's memory also beside what LoRA itself gains from dense context.
    """
    yield "| domain | condition | between | recovered of what dense context gains |"
    yield "| --- | --- | --- | --- |"
    for domain, columns in results.items():
        scores = {name: pooled(documents) for name, documents in columns.items()}
        for local, dense, of in (("backbone", "dense", ""), ("LoRA", "LoRA, dense", "LoRA, ")):
            if not {local, dense} <= scores.keys():
                continue
            for name, score in scores.items():
                if name not in (local, dense) and name.startswith(of):
                    share = recovery(scores[local], score, scores[dense])
                    shown = "" if share is None else f"{100 * share:.0f} %"
                    yield f"| {domain} | {name} | {local} and {dense} | {shown} |"


def conditions_of(results: Mapping[str, Result]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each column's tokens and perplexity by document."""
    for model, result in results.items():
        prefix = PREFIXES.get(model.split("_")[0], "")
        for name in result["conditions"]:
            if name == "backbone":
                shown = BACKBONES.get(model, "backbone")
            elif name == "dense":
                shown = "LoRA, dense" if model == "lora" else name
            elif name == "no_memory":
                off = "memory off" if model.endswith("memory") else "trained without memory"
                shown = prefix + off
            else:
                shown = prefix + name.replace("_", " ")
            yield (
                shown,
                {
                    document["id"]: (document["tokens"], document["perplexity"][name])
                    for document in result["per_document"]
                },
            )


def pooled(documents: Mapping[str, tuple[int, float]]) -> float:
    """Give the perplexity over all tokens of ``{id: (tokens, perplexity)}``."""
    tokens = sum(count for count, _ in documents.values())
    return exp(sum(count * log(value) for count, value in documents.values()) / tokens)


def change(one: Mapping[str, tuple[int, float]], other: Mapping[str, tuple[int, float]]) -> str:
    """Give the change of perplexity and its interval as the last cells of a row."""
    counts = torch.tensor([one[name][0] for name in one], dtype=torch.float64)
    logs = torch.tensor([log(one[name][1] / other[name][1]) for name in one], dtype=torch.float64)
    interval = paired_interval(
        counts * logs,
        counts,
        method="documents-t",
        condition="",
        against="",
        resamples=1,
        seed=0,
    )
    shown = [
        "" if value is None else f"{100 * (exp(value) - 1):+.1f} %"
        for value in (interval.difference, interval.low, interval.high)
    ]
    return f"{shown[0]} | {shown[1]} to {shown[2]} |"


if __name__ == "__main__":
    main()
