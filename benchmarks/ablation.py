"""Change one setting of the reference run at a time, train a little, and see what it does.

    python benchmarks/ablation.py --data FOLDER --output RUN --steps 300 --at-once 3

Trains each variant of `VARIANTS` on the train data of benchmarks/reference.py, in a process of its
own and several at once where the device has room, and scores it on validation documents alone.
RUN/<variant>.json is kept and not made again. The table gives perplexity with memory off and on, by
domain, and how the variant with its memory on stands to the base with its memory on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import reference
import reference_report

import memlayer
from memlayer.evaluation import PerplexityOptions, evaluate_perplexity
from memlayer.training import train

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "base, seed 1": {"seed": 1},
    "trained without memory": {"memory_off": True},
    "one memory layer (20)": {"memory_layers": (20,)},
    "memory_distance 0": {"memory_distance": 0},
    "memory_distance 512": {"memory_distance": 512},
    "chunk_size 4": {"chunk_size": 4},
    "top_k 16": {"top_k": 16},
    "top_k 128": {"top_k": 128},
    "reduction 2": {"layer_reduction_factor": 2},
    "reduction 5, three layers": {"layer_reduction_factor": 5, "memory_layers": (14, 18, 20)},
    "fusion softmax": {"fusion": "softmax"},
    "recency bias": {"recency_bias": True},
    "side_init identity": {"side_init": "identity"},
    "side_init backbone": {"side_init": "backbone"},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "gate learning rate 1e-1": {"gate_learning_rate": 1e-1},
    "shared memory": {"memory_scope": "batch"},
    "coupled": {"coupled": True, "layer_reduction_factor": 1},
}
"""Fields of `memlayer.LongMemConfig` and `memlayer.training.TrainingOptions`. With a shared memory
a row's memory holds the other rows' documents, as negatives."""

OPTIONS = ("seed", "learning_rate", "gate_learning_rate")


def main() -> None:
    """Parse, train every variant that is missing, print."""
    arguments = parse(sys.argv[1:])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.one is not None:
        run(arguments, arguments.one, output)
        return
    missing = [name for name in arguments.variants if not place_of(output, name).exists()]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        # Each is this very command for one variant.
        list(pool.map(lambda name: subprocess.run(command(name), check=False), missing))
    places = {name: place_of(output, name) for name in arguments.variants}
    made = {name: json.loads(at.read_text()) for name, at in places.items() if at.exists()}
    print("\n".join(lines_of(made)))
    failed = [name for name in places if name not in made]
    if failed:
        sys.exit(f"no result of {', '.join(failed)}: see what was printed above")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--documents", type=int, default=4, help="of each domain")
    parser.add_argument("--tokens", type=int, default=4097, help="of each document")
    mine, others = parser.parse_known_args(words)
    return argparse.Namespace(
        **{**vars(reference.parse(others)), **vars(mine), "split": "validation"}
    )


def command(name: str) -> list[str]:
    """Give the command that makes one variant."""
    return [sys.executable, __file__, *sys.argv[1:], "--one", name]


def place_of(output: Path, name: str) -> Path:
    """Give the file of one variant."""
    return output / f"{name.replace(' ', '-').replace(',', '')}.json"


def run(arguments: argparse.Namespace, name: str, output: Path) -> None:
    """Train and score one variant."""
    backbone = memlayer.load_backbone(
        arguments.backbone, dtype=arguments.dtype, device=arguments.device
    )
    changes = dict(VARIANTS[name])
    without = changes.pop("memory_off", False)
    options = {key: changes.pop(key) for key in OPTIONS if key in changes}
    model = memlayer.wrap(backbone.model, replace(reference.memory_config(arguments), **changes))
    documents = {
        split: reference.read_documents(Path(arguments.data), split, arguments)
        for split in ("train", "validation")
    }
    place = place_of(output, name)
    with model.disable_memory() if without else nullcontext():
        trained = train(
            model,
            backbone.tokenizer,
            documents["train"],
            documents["validation"][:1],
            replace(reference.training_options(arguments), eval_tokens=2048, **options),
            output=place.with_suffix(""),
        )
    model.eval()
    scores = {}
    for domain in reference.DOMAINS:
        result = evaluate_perplexity(
            model,
            reference_report.read_documents(arguments, domain, backbone),
            PerplexityOptions(
                fresh=False, resamples=100, memory_sizes=[] if without else [arguments.memory_size]
            ),
        ).to_dict()
        losses = {key: value["loss"] for key, value in result["conditions"].items()}
        scores[domain] = {"off": losses["no_memory"], "on": list(losses.values())[-1]}
    place.write_text(json.dumps({"training": trained.to_dict(), "losses": scores}) + "\n")


def lines_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Give the table; losses become perplexities."""
    yield (
        "| variant | "
        + " | ".join(f"{d}: off, on" for d in reference.DOMAINS)
        + " | on against base |"
    )
    yield "| --- |" + " --- |" * (len(reference.DOMAINS) + 1)
    base = results.get("base")
    for name, result in results.items():
        losses = result["losses"]
        cells = [
            f"{exp(losses[d]['off']):.2f}, {exp(losses[d]['on']):.2f}" for d in reference.DOMAINS
        ]
        against = ""
        if base is not None:
            changes = [losses[d]["on"] - base["losses"][d]["on"] for d in reference.DOMAINS]
            against = ", ".join(f"{100 * (exp(value) - 1):+.1f} %" for value in changes)
        yield f"| {name} | " + " | ".join(cells) + f" | {against} |"


if __name__ == "__main__":
    main()
