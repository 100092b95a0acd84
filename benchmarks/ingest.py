"""Time a long stream into a capped memory and into one that holds all of it.

    python benchmarks/ingest.py [--tokens 1000000] [--backbone smollm2-135m]

Prints, for a bank of 65,536 tokens and one of all tokens: time per token, peak memory of a process
of its own, seconds to save (whole, and one segment more), to load (checked, and mapped without
reading), and the cost per token of appending to a full bank against one half full, interleaved.
Keys are random unless a backbone is given, whose text is random token ids then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from memlayer.memory import MemoryBank, bank_info
from memlayer.plugins import default_plugins

CAPPED = 65_536


def make_bank(arguments: argparse.Namespace, capacity: int) -> MemoryBank:
    """Make an empty bank of the sizes of SmolLM2-135M, or as given."""
    backend: Any = default_plugins().backends.get(arguments.backend)
    dim = arguments.head_dim
    return MemoryBank(
        capacity=capacity,
        chunk_size=4,
        top_k=64,
        num_layers=1,
        num_key_value_heads=arguments.heads,
        head_dim=dim,
        make_index=lambda lanes: backend(lanes=lanes, dim=dim, device="cpu"),
        slack=arguments.segment,
        identity="benchmark",
    )


class Source:
    """Segments that are cheap to make and different enough."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        shape = (1, arguments.heads, 2 * arguments.segment, arguments.head_dim)
        self._keys = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._length = arguments.segment

    def write(self, bank: MemoryBank, start: int, tokens: int) -> None:
        """Append tokens that are numbered from ``start``."""
        shift = start // self._length % self._length
        keys = self._keys[:, :, shift : shift + tokens]
        offsets = torch.arange(start, start + tokens)
        sources = torch.stack([offsets % 49_152, torch.zeros_like(offsets), offsets], dim=1)
        bank.write(keys, keys, None, sources.unsqueeze(0))


def megabytes() -> float:
    """Give this process's peak resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ingest(arguments: argparse.Namespace, capacity: int, results: Any) -> None:
    """Fill one bank, save and load it; in a process of its own, for its peak."""
    torch.set_num_threads(arguments.threads)
    segments = range(0, arguments.tokens, arguments.segment)
    place = Path(tempfile.mkdtemp()) / "bank"
    try:
        if arguments.backbone is None:
            bank, source = make_bank(arguments, capacity), Source(arguments)
            before = megabytes()
            bank.document_number("stream")
            began = time.perf_counter()
            for start in segments:
                source.write(bank, start, min(arguments.segment, arguments.tokens - start))
        else:
            model = _wrap(arguments, capacity)
            bank, before = model.memory, megabytes()
            generator = torch.Generator().manual_seed(0)
            vocabulary = model.config.vocab_size
            pieces = (
                torch.randint(vocabulary, (1, arguments.segment), generator=generator)
                for _ in segments
            )
            began = time.perf_counter()
            model.memorize(pieces, document="stream")
        seconds = time.perf_counter() - began
        filled = megabytes()
        timed = {"whole": _time(lambda: bank.save(place))}
        one_more = Source(arguments) if arguments.backbone is None else None
        if one_more is not None:
            one_more.write(bank, arguments.tokens, arguments.segment)
        timed["more"] = _time(lambda: bank.save(place))
        size, shards = bank_info(place).size, bank_info(place).shards
        timed["load"] = _time(lambda: bank.load(place))
        timed["unverified"] = _time(lambda: bank.load(place, verify=False))
        results.send((len(bank), seconds, before, filled, megabytes(), size / 2**20, shards, timed))
    finally:
        shutil.rmtree(place.parent, ignore_errors=True)


def _time(act: Any) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _wrap(arguments: argparse.Namespace, capacity: int) -> Any:
    import memlayer

    backbone = memlayer.load_backbone(arguments.backbone).model
    config = memlayer.LongMemConfig(
        backend=arguments.backend, memory_size=capacity, segment_length=arguments.segment
    )
    return memlayer.wrap(backbone, config)


def compare_appends(arguments: argparse.Namespace) -> None:
    """Print the cost of appending to a full bank against one half full."""
    source, segment = Source(arguments), arguments.segment
    half, full = (make_bank(arguments, CAPPED) for _ in range(2))
    for bank in (half, full):
        bank.document_number("a long document")
    for start in range(0, CAPPED // 2, segment):
        source.write(half, start, segment)
    for start in range(0, CAPPED + 2 * segment, segment):
        source.write(full, start, segment)
    # Few rounds of small writes: half full has to stay about half full.
    tokens = segment // 8
    seconds: list[list[float]] = [[], []]
    for number in range(41):
        for side, bank in zip(seconds, (full, half), strict=True):
            took = _time(lambda bank=bank, number=number: source.write(bank, number, tokens))
            if number:
                side.append(took)
    ratio = statistics.median(seconds[0]) / statistics.median(seconds[1])
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    print(
        f"\nappending {tokens} tokens to a full bank of {CAPPED:,} / to one half full: "
        f"{ratio:.2f} (middle half {ratios[10]:.2f} to {ratios[30]:.2f}), "
        f"{1e6 * statistics.median(seconds[0]) / tokens:.2f} and "
        f"{1e6 * statistics.median(seconds[1]) / tokens:.2f} us a token"
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--backbone", help="read text with this backbone instead of random keys")
    parser.add_argument("--heads", type=int, default=3, help="key/value heads of random keys")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    what = arguments.backbone or f"random keys of {arguments.heads} heads of {arguments.head_dim}"
    print(f"{arguments.tokens:,} tokens, {what}, {arguments.backend}, float32\n")
    print(
        "| capacity | held | us a token | peak MiB: before, filled, after loading twice | "
        "files MiB (shards) | save s | one segment more s | load s | load unverified s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    context = multiprocessing.get_context("spawn")
    whole = -(-arguments.tokens // 4) * 4
    for capacity in (CAPPED, max(whole, CAPPED)):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=ingest, args=(arguments, capacity, send))
        process.start()
        send.close()
        try:
            length, seconds, *peaks, size, shards, timed = receive.recv()
        except EOFError:
            raise SystemExit("the measuring process failed; see above") from None
        process.join()
        print(
            f"| {capacity:,} | {length:,} | {1e6 * seconds / arguments.tokens:.1f} | "
            f"{', '.join(f'{peak:.0f}' for peak in peaks)} | {size:.0f} ({shards}) | "
            f"{timed['whole']:.2f} | {timed['more']:.2f} | {timed['load']:.2f} | "
            f"{timed['unverified']:.2f} |",
            flush=True,
        )
    compare_appends(arguments)


if __name__ == "__main__":
    main()
