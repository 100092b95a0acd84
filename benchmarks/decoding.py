"""Time and memory of decoding: at many sizes of the memory, across windows, over a long text.

    python benchmarks/decoding.py steps [--sizes 1024 4096 16384 65536] [--rounds 20]
    python benchmarks/decoding.py windows [--segment 256] [--tokens 384]
    python benchmarks/decoding.py long [--tokens 100000]

``steps``: one decoding step for each number of stored tokens, against the backbone's with its KV
cache, interleaved in one run. ``windows``: generate() over several windows, what moves to memory
included, against the backbone's generate() of the same tokens. ``long``: resident memory and time
per token while a tiny random model generates, and while SmolLM2 memorizes, as many tokens.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import memlayer
from memlayer.generation import new_window

if TYPE_CHECKING:
    from memlayer.memory import MemoryBank

FREE: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["steps", "windows", "long"])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    parser.add_argument("--local", type=int, default=512, help="tokens in the window (steps)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--segment", type=int, default=256, help="tokens of a window (windows)")
    parser.add_argument("--tokens", type=int, help="generated; default: 384, or 100000 for long")
    arguments = parser.parse_args()
    {"steps": steps, "windows": windows, "long": long}[arguments.what](arguments)


@torch.no_grad()
def steps(arguments: argparse.Namespace) -> None:
    """Time single steps, each side once a round."""
    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device).model
    config = memlayer.LongMemConfig(backend=arguments.backend, memory_size=max(arguments.sizes))
    model = memlayer.wrap(backbone, config).eval()
    ids = torch.randint(backbone.config.vocab_size, (1, arguments.local), device=model.device)
    banks = {size: filled_bank(model, size) for size in arguments.sizes}
    plain = DynamicCache(config=backbone.config)
    backbone(ids, past_key_values=plain, use_cache=True)
    caches = {}
    for size, bank in banks.items():
        model.memory, caches[size] = bank, new_window(model, 1)
        model(ids, past_key_values=caches[size], logits_to_keep=1)

    token = ids[:, :1]
    seconds: dict[int, list[float]] = {0: [], **{size: [] for size in banks}}
    for number in range(arguments.rounds + 2):
        for size, kept in seconds.items():
            if size:
                model.memory = banks[size]
            began = time.perf_counter()
            if size:
                model(token, past_key_values=caches[size], logits_to_keep=1)
            else:
                backbone(token, past_key_values=plain, use_cache=True)
            synchronize()
            if number >= 2:
                kept.append(time.perf_counter() - began)
    print(f"{arguments.backbone}, {arguments.backend}, {describe(model)}, ", end="")
    print(f"{arguments.local} tokens in the window, {arguments.rounds} rounds\n")
    print("| stored tokens | ms per token | against the backbone (quartiles) | against the least |")
    print("|---|---|---|---|")
    least = min(banks)
    for size, kept in seconds.items():
        row = [f"{1e3 * statistics.median(kept):.1f}", ratio(kept, seconds[0])]
        row.append(ratio(kept, seconds[least]) if size else "")
        print(f"| {size or 'backbone'} | " + " | ".join(row) + " |")


@torch.no_grad()
def windows(arguments: argparse.Namespace) -> None:
    """Time generate() over several windows, both sides in turn."""
    tokens = arguments.tokens or 384
    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device).model
    size = max(arguments.sizes)
    config = memlayer.LongMemConfig(
        backend=arguments.backend, memory_size=size, segment_length=arguments.segment
    )
    model = memlayer.wrap(backbone, config).eval()
    model.memory = filled_bank(model, size)
    ids = torch.randint(backbone.config.vocab_size, (1, arguments.segment), device=model.device)
    mask = torch.ones_like(ids)
    ours: list[float] = []
    theirs: list[float] = []
    sides: tuple[tuple[list[float], Any], ...] = ((ours, model), (theirs, backbone))
    for number in range(max(arguments.rounds // 5, 2) + 1):
        for kept, side in sides:
            began = time.perf_counter()
            side.generate(ids, attention_mask=mask, max_new_tokens=tokens, **FREE)
            synchronize()
            if number:
                kept.append((time.perf_counter() - began) / tokens)
    moved = new_window(model, 1).step
    print(
        f"{arguments.backbone}, {arguments.backend}, {describe(model)}: {tokens} tokens behind a "
    )
    print(f"full window of {arguments.segment}, of which {moved} move at a time, {size} stored: ")
    print(
        f"{1e3 * statistics.median(ours):.1f} ms per token, {ratio(ours, theirs)} of the backbone's"
    )


@torch.no_grad()
def long(arguments: argparse.Namespace) -> None:
    """Watch memory while text is generated without end, and while it is memorized."""
    tokens = arguments.tokens or 100_000
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
    )
    settings = memlayer.LongMemConfig(
        backend=arguments.backend, memory_size=4096, segment_length=256
    )
    model = memlayer.wrap(LlamaForCausalLM(config), settings).eval().to(arguments.device)
    watch = Watch(tokens, "generated, tiny model")
    ids = torch.randint(1, 64, (1, 8), device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        streamer=watch,
        **FREE,
    )

    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device).model
    settings = memlayer.LongMemConfig(
        backend=arguments.backend, memory_size=16_384, segment_length=512
    )
    reader = memlayer.wrap(backbone, settings)
    watch = Watch(tokens, f"memorized, {arguments.backbone}")
    reader.memorize(watch.passing(random_pieces(backbone.config.vocab_size, tokens)))


class Watch(BaseStreamer):
    """Prints resident memory and time per token, ten times over a run."""

    def __init__(self, total: int, name: str) -> None:
        self.total, self.name = total, name
        self.seen, self.told, self.began = 0, 0, time.perf_counter()
        print(f"\n| {name}: tokens | resident MB | ms per token since the line before |")
        print("|---|---|---|")

    def put(self, value: Tensor) -> None:
        """Take note of tokens."""
        self.seen += value.numel()
        if self.seen - self.told >= self.total // 10:
            now = time.perf_counter()
            each = 1e3 * (now - self.began) / (self.seen - self.told)
            print(f"| {self.seen} | {resident_megabytes():.0f} | {each:.2f} |", flush=True)
            self.told, self.began = self.seen, now

    def end(self) -> None:
        """Say what the most was."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"at most {most:.0f} MB")

    def passing(self, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """Hand pieces on, and take note of them when the next one is asked for."""
        for piece in pieces:
            yield piece
            self.put(piece)
        self.end()


def random_pieces(vocabulary: int, tokens: int) -> Iterator[Tensor]:
    """Give a stream of random tokens ``(1, 512)`` at a time."""
    generator = torch.Generator().manual_seed(0)
    for _ in itertools.repeat(None, -(-tokens // 512)):
        yield torch.randint(vocabulary, (1, 512), generator=generator)


def filled_bank(model: memlayer.LongMemModel, size: int) -> MemoryBank:
    """Make a memory that holds ``size`` random tokens."""
    bank = model.new_memory(memory_size=size)
    generator = torch.Generator().manual_seed(size)
    while len(bank) < size:
        shape = (1, bank.num_key_value_heads, min(4096, size), bank.head_dim)
        layer = torch.randn(shape, generator=generator).to(bank.device, bank.dtype)
        bank.write([layer] * bank.num_layers, [layer] * bank.num_layers)
    return bank


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Give the ratio of medians, and the quartiles of the rounds' ratios."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
    return f"{statistics.median(ours) / statistics.median(theirs):.2f} ({low:.2f} to {high:.2f})"


def resident_megabytes() -> float:
    """Give this process's resident memory, or the most so far where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 2**20


def describe(model: memlayer.LongMemModel) -> str:
    """Name the device and its threads."""
    return f"{model.device}, {torch.get_num_threads()} threads"


def synchronize() -> None:
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
