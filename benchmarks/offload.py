"""What it costs to keep keys and values off the device: one model, one text, three memories.

    python benchmarks/offload.py [--device cuda --dtype bf16 --memory 65536 1048576]
    python benchmarks/offload.py --places host mapped --device-memory 2 --memory 4194304

The same tokens are memorized with keys and values beside the model ("device"), in main memory
("host"), and in a saved bank that is mapped from its file ("mapped"). A training step (forward and
backward of one segment) is timed with each, interleaved. Prints the ratios with their spread, how
much is brought per step, and on a GPU the peak of its memory. All must give equal losses. The
second form is for a memory that the GPU, made out to be small, could not hold.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import memlayer
from memlayer.data import load_documents, tokenize_documents
from memlayer.memory import MemoryBank, bank, offload

PLACES = ("device", "host", "mapped")


def main() -> None:
    """Parse, and measure one memory size after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--data", default="python-docs", help="read over again if it is too short")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--memory", type=int, nargs="+", default=[65_536], help="tokens")
    parser.add_argument("--chunk-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", nargs="+", default=list(PLACES), choices=PLACES)
    parser.add_argument(
        "--device-memory",
        type=float,
        help="GiB that the GPU is made out to have",
    )
    arguments = parser.parse_args()
    if arguments.device_memory is not None:
        whole = torch.cuda.get_device_properties(arguments.device).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.device_memory * 2**30 / whole)
    loaded = memlayer.load_backbone(
        arguments.backbone, dtype=arguments.dtype, device=arguments.device
    )
    documents = tokenize_documents(
        load_documents([arguments.data], split="train"), loaded.tokenizer
    )
    text = torch.cat([document.input_ids for document in documents]).long()
    on_gpu = torch.device(arguments.device).type == "cuda"
    print(
        f"{arguments.backbone}, {arguments.dtype}, {arguments.backend}, "
        f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; one row, segments of {arguments.segment} tokens of "
        f"{arguments.data} ({len(text):,} tokens)\n"
    )
    print(
        "| memory, tokens | keys and values | step, ms | of the first's (spread) | brought, MiB | "
        "peak of the GPU, MiB |\n|---|---|---|---|---|---|"
    )
    for size in arguments.memory:
        measure(loaded.model, text, size, arguments)


def measure(backbone: Any, text: Tensor, size: int, arguments: argparse.Namespace) -> None:
    """Fill the memories with the same, time a step with each, print a line for each."""
    config = memlayer.LongMemConfig(
        backend=arguments.backend,
        memory_size=size,
        segment_length=arguments.segment,
        chunk_size=arguments.chunk_size,
    )
    model = memlayer.wrap(backbone, config)
    device = model.device
    segments = cut(text, arguments.segment)
    memories: dict[str, MemoryBank] = {}
    for place in [place for place in ("device", "host") if place in arguments.places]:
        memories[place] = model.memory = model.new_memory()
        model.memory.storage = "device" if place == "device" else "host"
        segments = cut(text, arguments.segment)
        while len(model.memory) < size:
            model.memorize(next(segments).to(device))
    with tempfile.TemporaryDirectory() as folder:
        if "mapped" in arguments.places:
            model.memory.save(folder)
            memories["mapped"] = model.new_memory()
            memories["mapped"].storage = "host"
            memories["mapped"].load(folder, verify=False)
        report(model, memories, next(segments).to(device), size, arguments)
        memories.clear()  # the file that one is mapped from goes


def report(
    model: memlayer.LongMemModel,
    memories: dict[str, MemoryBank],
    ids: Tensor,
    size: int,
    arguments: argparse.Namespace,
) -> None:
    """Time a step with each memory in turn, and print what was seen."""
    seconds: dict[str, list[float]] = {place: [] for place in memories}
    losses, peaks, brought = {}, dict.fromkeys(memories, 0.0), dict.fromkeys(memories, 0.0)
    model.train()
    for turn in range(arguments.rounds + 1):
        for place, memory in memories.items():
            model.memory = memory
            sizes: list[int] = []
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = now(model.device)
            with watched(sizes):
                loss = model(ids, labels=ids).loss
                loss.backward()
            took = now(model.device) - began
            losses[place] = loss.item()
            if turn:  # the first is for the allocators
                seconds[place].append(took)
            brought[place] = sum(sizes) / 2**20
            if model.device.type == "cuda":
                peaks[place] = torch.cuda.max_memory_allocated() / 2**20
            model.zero_grad(set_to_none=True)
    if len(set(losses.values())) > 1:
        raise SystemExit(f"the memories do not agree: {losses}")
    first = next(iter(memories))
    ring = memories[first]._held_ring()
    stored = (ring.keys.nbytes + ring.values.nbytes) / 2**20
    for place in memories:
        ratios = [a / b for a, b in zip(seconds[place], seconds[first], strict=True)]
        # What "device" holds there is no part of the others' peaks.
        others = stored + ring.chunk_keys.nbytes / 2**20 if first == "device" != place else 0
        peak = f"{peaks[place] - others:,.0f}" if model.device.type == "cuda" else ""
        print(
            f"| {size:,} | {place} | {1e3 * statistics.median(seconds[place]):,.0f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{brought[place]:.1f} of {stored:,.0f} | {peak} |",
            flush=True,
        )


def cut(text: Tensor, length: int) -> Iterator[Tensor]:
    """Give segments ``(1, length)``, over and over."""
    while True:
        for start in range(0, len(text) - length, length):
            yield text[None, start : start + length]


@contextmanager
def watched(sizes: list[int]) -> Iterator[None]:
    """Note how many bytes are brought."""

    def bring(*given: Any) -> Any:
        copies, places = offload.bring(*given)
        sizes.extend(copied.nbytes for copied in copies)
        return copies, places

    with mock.patch.object(bank, "bring", bring):
        yield


def now(device: torch.device) -> float:
    """Give the time at which everything before is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
