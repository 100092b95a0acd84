"""Show which layers of a backbone are worth reading before any training.

    python benchmarks/untrained_reading.py --data FILE [--layers 15 20 21 24] [--gates -1.5 0]

An untrained model differs from its backbone only by what it reads from memory. For each memory
layer and gate this prints the change of the mean loss against the backbone's, in percent of a nat,
over fresh segments of one document, for the first and the second half of each segment (the second
has local context, so it is the honest one).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import memlayer
from memlayer.data import Document, load_documents, tokenize_documents


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Give each token's loss in nats: ``(1, T, V)`` and ``(T,)`` to ``(T,)``."""
    return functional.cross_entropy(logits[0].float(), targets, reduction="none")


@torch.no_grad()
def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a source that memlayer reads")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--document", type=int, default=0, help="which one of the source")
    parser.add_argument("--skip-characters", type=int, default=20_000, help="title, contents")
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 20, 21, 24])
    parser.add_argument("--gates", type=float, nargs="+", default=[-1.5, 0.0])
    parser.add_argument("--segments", type=int, default=10)
    parser.add_argument("--segment-length", type=int, default=512)
    arguments = parser.parse_args()

    backbone = memlayer.load_backbone(arguments.backbone)
    document = load_documents([str(Path(arguments.data))], split="all")[arguments.document]
    length = arguments.segment_length
    text = document.text[arguments.skip_characters :][: arguments.segments * length * 8]
    cut = tokenize_documents([Document(document.id, text)], backbone.tokenizer)
    ids = cut[0].input_ids
    print(f"{arguments.backbone}, {document.id}, {arguments.segments} segments of {length}\n")
    print("| memory layer | gate | first half | second half |\n|---|---|---|---|")
    for layer in arguments.layers:
        config = memlayer.LongMemConfig(
            backend="torch", memory_layers=(layer,), segment_length=length
        )
        model = memlayer.wrap(backbone.model, config).eval()
        changes: dict[float, list[Tensor]] = {gate: [] for gate in arguments.gates}
        for number in range(arguments.segments):
            start = number * length
            states = model.encode(ids[start : start + length].unsqueeze(0))
            targets = ids[start + 1 : start + length + 1]
            plain = token_losses(model.backbone_logits(states), targets)
            for gate, kept in changes.items():
                model.side_network.gates[0].fill_(gate)
                kept.append(token_losses(model.read(states, model.memory), targets) - plain)
            model.remember(states)
        for gate, kept in changes.items():
            # The first segments have next to nothing to read.
            halves = 100 * torch.stack(kept[2:]).unflatten(1, (2, -1)).mean(dim=(0, 2))
            print(f"| {layer} | {gate} | {halves[0]:+.3f} % | {halves[1]:+.3f} % |", flush=True)


if __name__ == "__main__":
    main()
