"""Time one training step against the backbone's bare forward and against LoRA, interleaved.

    python benchmarks/training.py [--device cuda --dtype bf16 --segment 1024 --memory 65536]

Prints tokens a second and peak memory of every side, ratios with their spread, the share of the
arithmetic peak (operations that the weights alone ask for, over the rate of a large matrix product
on this machine), and how much of a step goes into searching and reading memory. LoRA is left out
where peft is not installed. Memory is full in every step, and rows are as many as --batch-size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

import memlayer
from memlayer import side_reading
from memlayer.memory import MemoryBank

Step = Callable[[], object]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--memory", type=int, default=65_536, help="tokens a row")
    parser.add_argument("--memory-layers", type=int, nargs="+")
    parser.add_argument("--reduction", type=int, default=2)
    parser.add_argument(
        "--side-rank", type=int, help="also LoRA of this rank of all layers, reading memory"
    )
    parser.add_argument("--chunk-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="also with layers compiled (LongMemModel.compile)"
    )
    arguments = parser.parse_args()

    backbone = load(arguments)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, arguments.segment + 1)
    ids = torch.randint(backbone.config.vocab_size, shape, generator=generator)
    ids = ids.to(arguments.device)
    sides = {"backbone's forward": forward_only(backbone, ids)}
    lora = lora_step(arguments, backbone, ids)
    sides["memory"], model = memory_step(arguments, backbone, ids)
    with_memory_off = without_memory(model, sides["memory"])
    sides["memory off"] = with_memory_off
    if lora is not None:
        sides["LoRA"] = lora
    if arguments.side_rank is not None:
        low_rank = {"side_rank": arguments.side_rank, "layer_reduction_factor": 1}
        sides["LoRA that reads memory"], _ = memory_step(arguments, backbone, ids, **low_rank)
    if arguments.compile:
        other = load(arguments)
        sides["memory, compiled"], compiled = memory_step(arguments, other, ids)
        compiled.compile()
        sides["backbone's forward, compiled"] = forward_only(other, ids)
    device = torch.device(arguments.device)
    seconds, peaks = interleave(sides, arguments.rounds, device)
    print(describe(arguments, device))
    print("| side | tokens/s | step, ms | of the forward's time (spread) | peak memory, MiB |")
    print("|---|---|---|---|---|")
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    for name, kept in seconds.items():
        ratios = [a / b for a, b in zip(kept, seconds["backbone's forward"], strict=True)]
        middle = statistics.median(kept)
        peak = "" if peaks[name] is None else f"{peaks[name]:,.0f}"
        print(
            f"| {name} | {tokens / middle:,.0f} | {1e3 * middle:.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {peak} |"
        )
    ceiling = matrix_rate(device, torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    used = operations(model, tokens) / statistics.median(seconds["memory"])
    print(
        f"\nShare of the arithmetic peak: {100 * used / ceiling:.1f} % "
        f"({used / 1e12:.2f} of {ceiling / 1e12:.2f} TFLOP/s, a large matrix product here)"
    )
    print(shares(sides["memory"], device, arguments.rounds))


# -------------------------------------------------------------------- sides


def load(arguments: argparse.Namespace) -> Any:
    """Give the backbone, anew each time."""
    return memlayer.load_backbone(
        arguments.backbone, dtype=arguments.dtype, device=arguments.device
    ).model


def forward_only(backbone: Any, ids: Tensor) -> Step:
    """Make the bare forward, head included."""

    def step() -> None:
        with torch.no_grad():
            backbone(ids[:, :-1], use_cache=False)

    return step


def memory_step(
    arguments: argparse.Namespace, backbone: Any, ids: Tensor, **changes: Any
) -> tuple[Step, memlayer.LongMemModel]:
    """Make a whole training step over a full memory."""
    config = memlayer.LongMemConfig(
        backend=arguments.backend,
        memory_size=arguments.memory,
        chunk_size=arguments.chunk_size,
        segment_length=arguments.segment,
        layer_reduction_factor=arguments.reduction,
        memory_layers=tuple(arguments.memory_layers) if arguments.memory_layers else None,
    )
    model = memlayer.wrap(backbone, replace(config, **changes))
    while len(model.memory) < arguments.memory:
        model.memorize(ids[:, :-1])
    parameters = list(model.trainable_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    return training_step(
        lambda: model(ids[:, :-1], update_memory=True).logits, ids, parameters, optimizer, arguments
    ), model


def without_memory(model: memlayer.LongMemModel, step: Step) -> Step:
    """Make the same step with the memory not read."""

    def off() -> None:
        with model.disable_memory():
            step()

    return off


def lora_step(arguments: argparse.Namespace, backbone: Any, ids: Tensor) -> Step | None:
    """Make LoRA's training step at about the side network's number of weights."""
    try:
        from lora import lora_model, trainable
    except ImportError:
        print("LoRA is left out: peft is not installed\n")
        return None
    depth = backbone.config.num_hidden_layers
    layer = sum(weight.numel() for weight in backbone.model.layers[0].parameters())
    adapted = lora_model(backbone, layer * -(-depth // arguments.reduction)).train()
    parameters = trainable(adapted)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    return training_step(
        lambda: adapted(input_ids=ids[:, :-1], use_cache=False).logits,
        ids,
        parameters,
        optimizer,
        arguments,
    )


def training_step(
    forward: Callable[[], Tensor],
    ids: Tensor,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    arguments: argparse.Namespace,
) -> Step:
    """Make forward, loss, backward, clipping and AdamW."""

    def step() -> None:
        autocast = arguments.dtype == "bf16"
        with torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext():
            logits = forward()
        loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# -------------------------------------------------------------------- measuring


def interleave(
    sides: dict[str, Step], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Time each side once a round, two rounds not counted; give seconds and peaks in MiB."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, float | None] = dict.fromkeys(sides)
    for number in range(rounds + 2):
        for name, step in sides.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            taken = timed(step, device)
            if number >= 2:
                seconds[name].append(taken)
            if device.type == "cuda":
                # What the step itself takes; weights and memories of all sides lie there always.
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return seconds, peaks


def timed(step: Step, device: torch.device) -> float:
    """Give the seconds that a step takes."""
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def shares(step: Step, device: torch.device, rounds: int) -> str:
    """Say which part of a step is spent in search and in attention over what was found."""
    spent = {"search": 0.0, "attention over what was found, forward": 0.0}
    with (
        measured(MemoryBank, "retrieve", spent, "search", device),
        measured(side_reading, "memory_attention", spent, list(spent)[1], device),
    ):
        step()
        spent.update(dict.fromkeys(spent, 0.0))
        whole = sum(timed(step, device) for _ in range(rounds))
    parts = ", ".join(f"{name} {100 * value / whole:.1f} %" for name, value in spent.items())
    return f"Of a step with waits around each part ({1e3 * whole / rounds:.1f} ms): {parts}"


@contextmanager
def measured(
    owner: Any, name: str, spent: dict[str, float], key: str, device: torch.device
) -> Iterator[None]:
    """Add up the seconds inside one function while this is entered."""
    original = getattr(owner, name)

    def timing(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        began = time.perf_counter()
        result = original(*args, **kwargs)
        synchronize(device)
        spent[key] += time.perf_counter() - began
        return result

    setattr(owner, name, timing)
    try:
        yield
    finally:
        setattr(owner, name, original)


def operations(model: memlayer.LongMemModel, tokens: int) -> float:
    """Count what the weights ask for: 2 a weight forward, 4 more where gradients are taken."""
    backbone = sum(weight.numel() for weight in model.backbone.parameters())
    embeddings = cast("Tensor", model.backbone.get_input_embeddings().weight)
    head = cast("Tensor", model.backbone.get_output_embeddings().weight)
    layers = backbone - embeddings.numel() - (head.numel() if head is not embeddings else 0)
    side = sum(weight.numel() for weight in model.trainable_parameters())
    # The head is run once, after the side network, with the gradient to its input.
    return tokens * (2 * layers + 6 * side + 4 * head.numel())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Give the operations a second of a large matrix product on random numbers."""
    n = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, n, n, device=device).to(dtype)
    for _ in range(3):
        left @ right
    return 2.0 * n**3 / statistics.median(timed(lambda: left @ right, device) for _ in range(10))


def describe(arguments: argparse.Namespace, device: torch.device) -> str:
    """Say what was measured and on what."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return (
        f"{arguments.backbone}, {arguments.batch_size} rows of {arguments.segment} tokens, memory "
        f"{arguments.memory} tokens a row in chunks of {arguments.chunk_size}, layers "
        f"{arguments.memory_layers or 'default'}, {arguments.dtype}, {arguments.backend}, {name}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )


if __name__ == "__main__":
    main()
