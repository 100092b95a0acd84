"""Train the reference side network and what it is compared with, all on the same tokens.

    python benchmarks/reference.py --data FOLDER --output RUN --device cuda --dtype bf16

FOLDER is laid out as books/books_train.jsonl.gz, technical/..., code/...; RUN gets one folder a
condition, and summary.json:

    memory    the side network, reading its memory: what is published
    control   the same side network, memory switched off throughout
    lora      the backbone with LoRA (peft) of about as many trainable weights, no memory

Only when asked for with --conditions, memory for LoRA itself, whose control is ``lora``:

    lora_memory    a side network of all layers with low-rank updates of as many weights

and both ways, one after the other, at the same cost in weights and tokens:

    tuned          LoRA of the weights that a smaller side network leaves, half of the steps
    tuned_memory   that side network around it, reading its memory; the other half of the steps
    tuned_control  the same, memory switched off throughout

Side networks are also kept in 8 bits, in a folder ``small``. A condition that is there already is
left out, so that the command can be given again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

import memlayer
from memlayer.config import Fusion
from memlayer.data import Document, load_documents, tokenize_documents
from memlayer.training import TrainingOptions, train

if TYPE_CHECKING:
    from memlayer.backbones import Backbone

DOMAINS = ("books", "technical", "code")
CONDITIONS = (
    "memory",
    "control",
    "lora",
    "lora_memory",
    "tuned",
    "tuned_memory",
    "tuned_control",
)


def main() -> None:
    """Parse, train every condition, write."""
    arguments = parse(sys.argv[1:])
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    summary = output / "summary.json"
    # A small one on a GPU, so that what it wrote down is kept in half width there too.
    backbone = memlayer.load_backbone(
        arguments.backbone, dtype=arguments.dtype, device=arguments.device
    )
    documents = {
        split: read_documents(Path(arguments.data), split, arguments)
        for split in ("train", "validation")
    }
    for condition in arguments.conditions:
        if condition in read_summary(summary):
            continue
        began = time.perf_counter()
        result = make_condition(condition, arguments, backbone, documents)
        result |= {
            "wall_seconds": time.perf_counter() - began,
            "device": device_name(arguments.device),
            "arguments": vars(arguments),
        }
        # Read again: another process may have made another condition meanwhile.
        done = {**read_summary(summary), condition: result}
        summary.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        print(json.dumps({condition: result}))


def read_summary(path: Path) -> dict[str, Any]:
    """Give what is known of the conditions that are there."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    defaults = TrainingOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS[:3], choices=CONDITIONS)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--characters", type=int, default=240_000, help="of each document")

    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--segment-length", type=int, default=512)
    parser.add_argument("--stride", type=int, help="of segments that overlap; none if left out")
    parser.add_argument("--excerpt-tokens", type=int, help="of a document at a turn")
    parser.add_argument("--lead-tokens", type=int, default=0, help="memorized before an excerpt")
    parser.add_argument("--memory-dropout", type=float, default=0.0, help="segments without memory")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--gate-learning-rate", type=float, default=2e-2)
    parser.add_argument("--lora-learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=defaults.warmup)
    parser.add_argument("--eval-tokens", type=int, default=16_384)

    parser.add_argument("--memory-layers", type=int, nargs="+", default=[14, 16, 20, 22])
    parser.add_argument("--reduction", type=int, default=3)
    parser.add_argument(
        "--lora-memory-layers", type=int, nargs="+", help="of lora_memory; --memory-layers else"
    )
    parser.add_argument("--fusion", default="gate", choices=get_args(Fusion))
    parser.add_argument("--recency-bias", action="store_true")
    parser.add_argument("--tuned-memory-layers", type=int, nargs="+", default=[14, 18, 20])
    parser.add_argument("--tuned-reduction", type=int, default=5)
    parser.add_argument("--memory-size", type=int, default=16_384)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=1)
    return parser.parse_args(words)


def read_documents(folder: Path, split: str, arguments: argparse.Namespace) -> list[Document]:
    """Give the beginnings of all documents of one split."""
    return [
        replace(document, text=document.text[: arguments.characters])
        for domain in DOMAINS
        for document in load_documents(
            [str(folder / domain / f"{domain}_{split}.jsonl.gz")], split="all"
        )
    ]


def training_options(arguments: argparse.Namespace) -> TrainingOptions:
    """Give what all conditions have in common."""
    return TrainingOptions(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        gate_learning_rate=arguments.gate_learning_rate,
        stride=arguments.stride,
        excerpt_tokens=arguments.excerpt_tokens,
        lead_tokens=arguments.lead_tokens,
        memory_dropout=arguments.memory_dropout,
        warmup=arguments.warmup,
        dtype=arguments.dtype,
        seed=arguments.seed,
        eval_every=None,
        eval_tokens=arguments.eval_tokens,
        save_every=None,
    )


def memory_config(arguments: argparse.Namespace) -> memlayer.LongMemConfig:
    """Give the side network's settings."""
    return memlayer.LongMemConfig(
        backend=arguments.backend,
        memory_size=arguments.memory_size,
        top_k=arguments.top_k,
        chunk_size=arguments.chunk_size,
        memory_layers=tuple(arguments.memory_layers),
        layer_reduction_factor=arguments.reduction,
        fusion=arguments.fusion,
        recency_bias=arguments.recency_bias,
        segment_length=arguments.segment_length,
    )


def make_condition(
    condition: str,
    arguments: argparse.Namespace,
    backbone: Backbone,
    documents: dict[str, list[Document]],
) -> dict[str, Any]:
    """Train one condition of `CONDITIONS`."""
    output = Path(arguments.output) / condition
    whole = memory_config(arguments)
    part = replace(
        whole,
        memory_layers=tuple(arguments.tuned_memory_layers),
        layer_reduction_factor=arguments.tuned_reduction,
    )
    tuning_steps = arguments.steps // 2
    options = training_options(arguments)
    if condition in ("memory", "control"):
        return train_side_network(whole, options, backbone, documents, output)
    if condition == "lora":
        weights = trainable_weights(backbone, whole)
        return train_lora_control(arguments, options, weights, backbone, documents, output)
    if condition == "lora_memory":
        layers = arguments.lora_memory_layers or arguments.memory_layers
        config = low_rank_config(backbone, whole, tuple(layers))
        options = replace(options, learning_rate=arguments.lora_learning_rate)
        return train_side_network(config, options, backbone, documents, output)
    if condition == "tuned":
        options = replace(options, steps=tuning_steps)
        weights = trainable_weights(backbone, whole) - trainable_weights(backbone, part)
        return train_lora_control(arguments, options, weights, backbone, documents, output)
    # Another seed, another order: the tokens that come first are not those of the tuning.
    options = replace(options, steps=arguments.steps - tuning_steps, seed=arguments.seed + 1)
    tuned = memlayer.load_backbone(
        str(output.with_name("tuned")), dtype=arguments.dtype, device=arguments.device
    )
    return train_side_network(part, options, tuned, documents, output)


def train_side_network(
    config: memlayer.LongMemConfig,
    options: TrainingOptions,
    backbone: Backbone,
    documents: dict[str, list[Document]],
    output: Path,
) -> dict[str, Any]:
    """Train a side network; one called ``control`` with its memory switched off."""
    model = memlayer.wrap(backbone.model, config)
    with model.disable_memory() if output.name.endswith("control") else nullcontext():
        result = train(
            model,
            backbone.tokenizer,
            documents["train"],
            documents["validation"],
            options,
            output=output,
        )
    model.save_pretrained(output / "small", dtype="int8")
    trainable = sum(weight.numel() for weight in model.trainable_parameters())
    gates = [torch.sigmoid(gate).tolist() for gate in model.side_network.gates]
    return {**result.to_dict(), "trainable": trainable, "gates": gates}


def low_rank_config(
    backbone: Backbone, config: memlayer.LongMemConfig, memory_layers: tuple[int, ...]
) -> memlayer.LongMemConfig:
    """Give LoRA of the whole backbone about as many weights as a side network has."""
    weights = trainable_weights(backbone, config)
    whole = replace(config, layer_reduction_factor=1, side_rank=1, memory_layers=memory_layers)
    return replace(whole, side_rank=max(1, round(weights / trainable_weights(backbone, whole))))


def trainable_weights(backbone: Backbone, config: memlayer.LongMemConfig) -> int:
    """Count the weights of a side network."""
    wrapped = memlayer.wrap(backbone.model, config)
    return sum(weight.numel() for weight in wrapped.trainable_parameters())


def train_lora_control(
    arguments: argparse.Namespace,
    options: TrainingOptions,
    weights: int,
    backbone: Backbone,
    documents: dict[str, list[Document]],
    output: Path,
) -> dict[str, Any]:
    """Train LoRA of about so many weights."""
    from lora import lora_model, train_without_memory, trainable

    model = lora_model(backbone.model, weights, arguments.seed)
    losses: list[tuple[int, float]] = []
    began = time.perf_counter()
    tokens = train_without_memory(
        model.train(),
        tokenize_documents(documents["train"], backbone.tokenizer),
        options,
        segment_length=arguments.segment_length,
        learning_rate=arguments.lora_learning_rate,
        log=lambda step, loss: losses.append((step, loss)),
    )
    seconds = time.perf_counter() - began
    model.save_pretrained(str(output))
    counted = sum(weight.numel() for weight in trainable(model))
    return {
        "steps": options.steps,
        "tokens": tokens,
        "seconds": seconds,
        "losses": losses,
        "trainable": counted,
    }


def device_name(device: str) -> str:
    """Say what the run was on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
