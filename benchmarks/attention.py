"""Time and peak memory of attention over what was retrieved: in blocks, and the plain way.

    python benchmarks/attention.py [--memory 65536] [--tokens 1024] [--device cuda]

The plain way gathers the keys and values of all tokens, K times their size, and lets autograd keep
them. Ours gathers a block of tokens at a time and gathers again on the way back. Both are given the
same retrieved chunks; results and gradients are compared. Memory is measured in a process of its
own for each (resident set on a CPU, allocated on a GPU), above what it was before the call.

With ``--backbone`` also a whole forward with a full memory against the backbone's own: its peak
memory above what model and bank take.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memlayer
from memlayer.attention import memory_attention
from memlayer.memory import MemoryBank, Retrieved
from memlayer.plugins import default_plugins


def plain_attention(query: Tensor, retrieved: Retrieved, scaling: float) -> Tensor:
    """Attend as the formula says, with everything there at once."""
    keys, values, found = retrieved.gather()  # (B, H, T, K, D)
    scores = torch.einsum("bhtd,bhtkd->bhtk", query.float(), keys.float()) * scaling
    weights = scores.masked_fill(~found, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhtk,bhtkd->bhtd", weights, values.float()).to(query.dtype)


FORMS: dict[str, Callable[[Tensor, Retrieved, float], Tensor]] = {
    "plain": plain_attention,
    "blocks": lambda query, retrieved, scaling: memory_attention(query, retrieved, scaling)[0],
}


def make_case(arguments: argparse.Namespace) -> tuple[Tensor, Retrieved]:
    """Fill a bank with random keys and search it."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    backend: Any = default_plugins().backends.get("torch")
    device, dim = arguments.device, arguments.head_dim
    bank = MemoryBank(
        capacity=arguments.memory,
        chunk_size=arguments.chunk_size,
        top_k=arguments.top_k,
        num_layers=1,
        num_key_value_heads=arguments.key_value_heads,
        head_dim=dim,
        make_index=lambda lanes: backend(lanes=lanes, dim=dim, device=device),
        slack=1024,
        identity="benchmark",
        device=device,
    )
    shape = (1, arguments.key_value_heads, 1024, dim)
    while len(bank) < arguments.memory:
        keys, values = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        bank.write(keys, values)
    shape = (1, arguments.heads, arguments.tokens, dim)
    query = torch.randn(shape, generator=generator).to(device)
    return query.requires_grad_(), bank.retrieve(query)


def run_form(form: str, query: Tensor, retrieved: Retrieved, *, backward: bool) -> Tensor:
    """Run forward, or forward and backward; give the output or the gradient."""
    with torch.set_grad_enabled(backward):
        output = FORMS[form](query, retrieved, query.shape[-1] ** -0.5)
    if not backward:
        return output
    (gradient,) = torch.autograd.grad(output.square().sum(), query)
    return gradient


def times(arguments: argparse.Namespace, backward: bool) -> dict[str, list[float]]:
    """Time both forms in turn and check that they agree."""
    query, retrieved = make_case(arguments)
    results = {form: run_form(form, query, retrieved, backward=backward) for form in FORMS}
    torch.testing.assert_close(results["blocks"], results["plain"], rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(arguments.rounds):
        for form, kept in seconds.items():
            began = time.perf_counter()
            run_form(form, query, retrieved, backward=backward)
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - began)
    return seconds


def peak_of_form(arguments: argparse.Namespace, form: str, backward: bool) -> float:
    """Give MiB above what stood before one call."""
    query, retrieved = make_case(arguments)
    return peak_of(lambda: run_form(form, query, retrieved, backward=backward), arguments.device)


def peak_of_forward(arguments: argparse.Namespace, side: str) -> float:
    """Give MiB that a forward of the whole model takes above model and bank."""
    torch.set_num_threads(arguments.threads)
    backbone = memlayer.load_backbone(arguments.backbone, device=arguments.device).model
    config = memlayer.LongMemConfig(
        memory_size=arguments.memory, segment_length=arguments.tokens, backend="torch"
    )
    model = memlayer.wrap(backbone, config).eval()
    shape = (1, model.parts.num_key_value_heads, 1024, model.parts.head_dim)
    segment = torch.randn(shape).to(arguments.device, backbone.dtype)
    while len(model.memory) < arguments.memory:
        model.memory.write(segment, segment)
    ids = torch.randint(backbone.config.vocab_size, (1, arguments.tokens)).to(arguments.device)
    with torch.no_grad():
        model(ids[:, :8], use_cache=False)  # Libraries set up what they keep.
        run = model if side == "memory" else backbone
        return peak_of(lambda: run(ids, use_cache=False), arguments.device)


def peak_of(call: Callable[[], object], device: str) -> float:
    """Give the most MiB that a call takes above what is in use before."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts again (Linux).
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    """Read a number of KiB from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="also a whole forward of this one")
    parser.add_argument("--memory", type=int, default=65_536, help="tokens stored")
    parser.add_argument("--tokens", type=int, default=1024, help="of the segment")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-value-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=64, help="tokens retrieved by each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    print(
        f"{arguments.tokens} tokens, {arguments.heads} heads of {arguments.head_dim}, "
        f"K = {arguments.top_k}, {arguments.device}, {arguments.threads} threads\n\n"
        "| pass | plain | blocks | ratio of times (spread) | peak plain | peak blocks |\n"
        "|---|---|---|---|---|---|"
    )
    for backward, name in ((False, "forward"), (True, "forward and backward")):
        seconds = alone(times, arguments, backward)
        ratios = [b / a for a, b in zip(seconds["plain"], seconds["blocks"], strict=True)]
        plain, blocks = (1e3 * statistics.median(seconds[form]) for form in FORMS)
        peaks = [alone(peak_of_form, arguments, form, backward) for form in FORMS]
        print(
            f"| {name} | {plain:.0f} ms | {blocks:.0f} ms | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB |",
            flush=True,
        )
    if arguments.backbone:
        memory, bare = (alone(peak_of_forward, arguments, side) for side in ("memory", "backbone"))
        print(
            f"\nPeak of a forward with {arguments.memory} tokens in memory, above model and bank: "
            f"{memory:.0f} MiB; of the backbone's: {bare:.0f} MiB; ratio {memory / bare:.2f} "
            "(reach: 1.5)"
        )


if __name__ == "__main__":
    main()
