"""Time the model against its own backbone, both sides interleaved in one run.

    python benchmarks/speed.py [--backbone smollm2-135m] [--memory 65536] [--segment 1024]

Prints, for each quantity, the ratio of medians and its spread (lowest and highest ratio of single
rounds), so that a slow or busy machine changes little: ingestion against the backbone's forward, a
forward that reads a full memory against the backbone's forward, one decoding step against the
backbone's, and appending to a full bank against one half full.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache

import memlayer


def interleave(rounds: int, *sides: Callable[[], object]) -> list[list[float]]:
    """Time each side once per round, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, kept in zip(sides, seconds, strict=True):
            began = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                kept.append(time.perf_counter() - began)
    return seconds


def report(name: str, ours: list[float], theirs: list[float], target: str) -> None:
    """Print one line: the ratio of medians, its spread, both medians."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"| {name} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{1e3 * statistics.median(ours):.1f} ms / {1e3 * statistics.median(theirs):.1f} ms | "
        f"{target} |"
    )


@torch.no_grad()
def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--memory", type=int, default=65_536, help="tokens stored")
    parser.add_argument("--segment", type=int, default=1024, help="tokens of a forward")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device).model
    config = memlayer.LongMemConfig(
        backend=arguments.backend,
        memory_size=arguments.memory,
        segment_length=arguments.segment,
    )
    model = memlayer.wrap(backbone, config).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.config.vocab_size
    ids = torch.randint(vocabulary, (1, arguments.segment), generator=generator)
    ids = ids.to(arguments.device)
    print(f"{arguments.backbone}, {arguments.segment} tokens, memory {arguments.memory}, ", end="")
    print(f"{arguments.backend}, {arguments.device}, {torch.get_num_threads()} threads\n")
    print("| what | ratio of medians (spread) | ours / backbone | reach |\n|---|---|---|---|")

    ingestion = memlayer.wrap(backbone, config)
    ours, theirs = interleave(
        arguments.rounds, lambda: ingestion.memorize(ids), lambda: backbone(ids, use_cache=False)
    )
    report("backbone's forward / memorize", theirs, ours, ">= 1.2")

    shape = (1, model.parts.num_key_value_heads, arguments.segment, model.parts.head_dim)
    segment = torch.randn(shape, generator=generator).to(arguments.device, backbone.dtype)
    half = model.new_memory()
    while len(half) < arguments.memory // 2:
        half.write(segment, segment)
    while len(model.memory) < arguments.memory:
        model.memory.write(segment, segment)
    ours, theirs = interleave(
        arguments.rounds,
        lambda: model(ids, use_cache=False),
        lambda: backbone(ids, use_cache=False),
    )
    report("forward with a full memory / backbone's", ours, theirs, "<= 1.9")

    token = ids[:, :1]
    caches = [DynamicCache(config=backbone.config) for _ in range(2)]
    model(ids[:, :256], past_key_values=caches[0])
    backbone(ids[:, :256], past_key_values=caches[1], use_cache=True)
    ours, theirs = interleave(
        4 * arguments.rounds,
        lambda: model(token, past_key_values=caches[0]),
        lambda: backbone(token, past_key_values=caches[1], use_cache=True),
    )
    report("decoding step with a full memory / backbone's", ours, theirs, "<= 2")

    # A few small writes only: half full has to stay half full.
    few = segment[:, :, : arguments.segment // 8]
    ours, theirs = interleave(
        4 * arguments.rounds,
        lambda: model.memory.write(few, few),
        lambda: half.write(few, few),
    )
    report("append to a full bank / to one half full", ours, theirs, "<= 1.2")


if __name__ == "__main__":
    main()
