"""Show which layers of a backbone are worth reading before any training, and how.

    python benchmarks/untrained_reading.py --data FILE [--layers 20 15,16,17,18,19,20,21]
        [--fusions gate softmax] [--gates -2 -1]

An untrained model differs from its backbone only by what it reads from memory. For each set of
memory layers, way of mixing and value of all gates this prints the change of perplexity against the
backbone, over fresh segments of some documents: of all tokens, of each segment's first 64, and of
its second half (which has local context, so it is the honest one).
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor
from torch.nn import functional

import memlayer
from memlayer.config import Fusion
from memlayer.data import Document, TokenDocument, load_documents, tokenize_documents

if TYPE_CHECKING:
    from memlayer.backbones import Backbone

NOTHING_YET = 2
"""Segments of a document that are not counted: there is next to nothing to read."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Give each token's loss in nats: ``(1, T, V)`` and ``(T,)`` to ``(T,)``."""
    return functional.cross_entropy(logits[0].float(), targets, reduction="none")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a source that memlayer reads")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--documents", type=int, default=2, help="the first ones of the source")
    parser.add_argument("--skip-characters", type=int, default=20_000, help="title, contents")
    parser.add_argument("--layers", nargs="+", default=["20", "15,16,17,18,19,20,21"])
    parser.add_argument("--fusions", nargs="+", default=get_args(Fusion), choices=get_args(Fusion))
    parser.add_argument("--gates", type=float, nargs="+", default=[-2.0, -1.0])
    parser.add_argument("--segments", type=int, default=7, help="of each document")
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--chunk-size", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=64)
    return parser.parse_args()


def read_documents(arguments: argparse.Namespace, backbone: Backbone) -> list[TokenDocument]:
    """Give a stretch of each document, in tokens."""
    characters = arguments.segments * arguments.segment_length * 8
    documents = load_documents([arguments.data], split="all")[: arguments.documents]
    start = arguments.skip_characters
    cut = [Document(one.id, one.text[start : start + characters]) for one in documents]
    return tokenize_documents(cut, backbone.tokenizer)


@torch.no_grad()
def changes(
    model: memlayer.LongMemModel,
    documents: list[TokenDocument],
    gates: list[float],
    arguments: argparse.Namespace,
) -> dict[float, Tensor]:
    """Give each token's loss less the backbone's, ``(segments, T)``, by the value of all gates."""
    length = arguments.segment_length
    found: dict[float, list[Tensor]] = {gate: [] for gate in gates}
    for document in documents:
        model.memory.clear()
        for number in range(arguments.segments):
            start, ids = number * length, document.input_ids
            states = model.encode(ids[start : start + length].unsqueeze(0))
            targets = ids[start + 1 : start + length + 1]
            if number >= NOTHING_YET:
                plain = token_losses(model.backbone_logits(states), targets)
                for gate, kept in found.items():
                    for weights in model.side_network.gates:
                        weights.fill_(gate)
                    kept.append(token_losses(model.read(states, model.memory), targets) - plain)
            model.remember(states)
    return {gate: torch.stack(kept) for gate, kept in found.items()}


def percent(differences: Tensor) -> str:
    """Turn differences of losses into a change of perplexity."""
    return f"{100 * (math.exp(differences.mean().item()) - 1):+.1f} %"


def main() -> None:
    """Parse, measure, print."""
    arguments = parse()
    backbone = memlayer.load_backbone(arguments.backbone)
    documents = read_documents(arguments, backbone)
    print("| memory layers | fusion | gates | all | first 64 | second half |\n|" + "---|" * 6)
    for layers in arguments.layers:
        for fusion in arguments.fusions:
            config = memlayer.LongMemConfig(
                backend="torch",
                memory_layers=tuple(int(layer) for layer in layers.split(",")),
                layer_reduction_factor=1,
                side_rank=1,
                fusion=fusion,
                chunk_size=arguments.chunk_size,
                top_k=arguments.top_k,
                segment_length=arguments.segment_length,
            )
            model = memlayer.wrap(backbone.model, config).eval()
            for gate, found in changes(model, documents, arguments.gates, arguments).items():
                parts = found, found[:, :64], found[:, found.shape[1] // 2 :]
                row = layers.replace(",", ", "), fusion, f"{gate:g}", *map(percent, parts)
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
