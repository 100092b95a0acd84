"""kNN-LM as a control: settings chosen on validation data, then scored beside memory on test data.

    python benchmarks/knn_lm.py --data DATA --checkpoint checkpoints/smollm2-135m

DATA has books/books_validation.jsonl.gz and so on. Every validation document is read once in fresh
segments; the same nearest contexts then vote with every weight and temperature, and the best
settings of each domain are taken. With a checkpoint, the test documents of benchmarks/reference.py
are scored: the backbone, kNN-LM, the side network with as many tokens of memory, and both.
"""

from __future__ import annotations

import argparse
import itertools
import math
from typing import Any

import torch
from reference_report import read_documents
from torch.nn import functional

import memlayer
from memlayer.data.windows import windows
from memlayer.evaluation import PerplexityOptions, evaluate_perplexity
from memlayer.evaluation.knn_lm import NearestTokens, mix

WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.3)
NEIGHBORS = (64, 256, 1024)
SEGMENT = 512
# Documents of the test split, tokens of each, tokens of memory: those of docs/results.md.
TEST = {
    "books": (10, 16_385, 16_384),
    "technical": (8, 8_193, 65_536),
    "code": (8, 8_193, 65_536),
}


def main() -> None:
    """Parse; choose, score and print for one domain after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--domains", nargs="+", default=list(TEST), choices=TEST)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--checkpoint", help="without one, settings are chosen and that is all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two short documents of each split")
    arguments = parser.parse_args()
    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device)
    rows = []
    for domain in arguments.domains:
        count, tokens, memory = TEST[domain]
        chosen = choose(arguments, domain, backbone, memory)
        if arguments.checkpoint:
            size = (2, 1025) if arguments.quick else (count, tokens)
            documents = documents_of(arguments, "test", domain, backbone, *size)
            options = PerplexityOptions(
                segment_length=SEGMENT,
                fresh=False,
                memory_sizes=[memory],
                knn_lm=True,
                resamples=1000,
                **chosen,
            )
            model = memlayer.load(arguments.checkpoint, backbone=backbone.model, backend="torch")
            result = evaluate_perplexity(model, documents, options)
            model.unwrap()
            rows.append(row(domain, result))
    if rows:
        heads = ("domain, tokens", "backbone", "kNN-LM", "memory on", "both")
        compared = (
            "kNN-LM against the backbone",
            "memory on against kNN-LM",
            "both against memory on",
        )
        print("| " + " | ".join((*heads, *compared)) + " |\n|" + 8 * "---|")
        print("\n".join(rows))


def documents_of(
    arguments: argparse.Namespace, split: str, domain: str, backbone: Any, count: int, tokens: int
) -> list[Any]:
    """Give the beginnings of a split's first long documents."""
    wanted = argparse.Namespace(data=arguments.data, split=split, documents=count, tokens=tokens)
    return read_documents(wanted, domain, backbone)


def row(domain: str, result: Any) -> str:
    """Give a line of the table."""
    report = result.overall
    names = ("backbone", "knn_lm", result.headline, "knn_memory")
    cells = [f"{report.conditions[name].perplexity:.2f}" for name in names]
    for condition, against in (
        ("knn_lm", "backbone"),
        (result.headline, "knn_lm"),
        ("knn_memory", result.headline),
    ):
        interval = report.interval(condition, against, "documents-t")
        low, middle, high = (
            100 * math.expm1(value) for value in (interval.low, interval.difference, interval.high)
        )
        cells.append(f"{middle:+.1f} % ({low:+.1f} to {high:+.1f} %)")
    return f"| {domain}, {result.tokens:,} | " + " | ".join(cells) + " |"


def choose(
    arguments: argparse.Namespace, domain: str, backbone: Any, memory: int
) -> dict[str, Any]:
    """Give the settings that are best on validation documents, and print all of them."""
    size = (2, 1025) if arguments.quick else (4, 4097)
    model = memlayer.wrap(backbone.model, memlayer.LongMemConfig(backend="torch"))
    parts = [
        part
        for document in documents_of(arguments, "validation", domain, backbone, *size)
        for part in read(model, document.input_ids, memory)
    ]
    model.unwrap()
    return report(domain, *(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.inference_mode()
def read(
    model: memlayer.LongMemModel, ids: torch.Tensor, memory: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Give each window's losses, and what its nearest contexts say."""
    nearest = NearestTokens(
        model.new_index(1, model.parts.hidden_size + 1),
        capacity=memory,
        neighbors=max(NEIGHBORS),
        weight=0.5,
        temperature=1.0,
    )
    found = []
    for window in windows(len(ids) - 1, SEGMENT, SEGMENT):
        states = model.encode(ids[None, window.start : window.end].to(model.device))
        targets = ids[window.start + 1 : window.end + 1]
        logits = model.backbone_logits(states)[0].float().cpu()
        own = functional.cross_entropy(logits, targets, reduction="none")
        hidden = model.parts.final_norm(states.hidden_states[-1][0])
        nearest.write_before(window.start)
        votes = nearest.votes(hidden, targets)
        width = max(NEIGHBORS)
        near = torch.full((len(own), width), -math.inf)
        agree = torch.zeros(len(own), width, dtype=torch.bool)
        if votes is not None:
            near[:, : votes[0].shape[1]], agree[:, : votes[1].shape[1]] = votes
        found.append((own, near, agree))
        nearest.push(hidden, targets)
    return found


def report(
    domain: str, own: torch.Tensor, near: torch.Tensor, agree: torch.Tensor
) -> dict[str, Any]:
    """Print a table for one domain, and give the best settings."""
    asked = near[:, 0] > -math.inf
    # How much farther a query's 16th neighbour is than its first: the scale for temperatures.
    scale = float((near[asked, 0] - near[asked, 15]).median())
    temperatures = [round(scale * factor, 1) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    before = float(own.double().mean())
    print(f"{domain}, {len(own):,} validation tokens, backbone {math.exp(before):.2f}\n")
    print("| neighbors | temperature | " + " | ".join(f"weight {w}" for w in WEIGHTS) + " |")
    print("|---|---|" + "---|" * len(WEIGHTS))
    tried: list[tuple[float, dict[str, Any]]] = []
    for neighbors, temperature in itertools.product(NEIGHBORS, temperatures):
        cells = []
        for weight in WEIGHTS:
            mixed = own.clone()
            votes = near[asked, :neighbors], agree[asked, :neighbors]
            mixed[asked] = mix(own[asked], *votes, weight=weight, temperature=temperature)
            change = 100 * math.expm1(float(mixed.double().mean()) - before)
            cells.append(f"{change:+.2f} %")
            settings = {
                "knn_neighbors": neighbors,
                "knn_weight": weight,
                "knn_temperature": temperature,
            }
            tried.append((change, settings))
        print(f"| {neighbors} | {temperature} | " + " | ".join(cells) + " |")
    change, best = min(tried, key=lambda one: one[0])
    print(f"\nbest: {change:+.2f} % with {best}\n", flush=True)
    return best


if __name__ == "__main__":
    main()
