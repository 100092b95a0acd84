"""Time the retrieval backends against the paper's way of searching, interleaved in one run.

    python benchmarks/real_pairs.py --data FILE --output pairs.safetensors
    python benchmarks/retrieval.py --pairs pairs.safetensors --output FOLDER
    python benchmarks/retrieval.py --report FOLDER          # table and figure again, from FOLDER

Three yardsticks stand beside the backends:

    floor   the bare matrix products of all queries and keys, nothing kept
    paper   a Python loop over heads, a flat faiss index each, as the method was published
    recall  the share of the true best k that a search finds, float32 products of real pairs

Each backend is a name with its options: ``faiss:index=ivf,nprobe=16``. Sizes are in tokens of
memory, of which ``--chunk-size`` share one vector. Every size is a process of its own, so that the
memory of one is no burden for the next, and is added to ``FOLDER/retrieval.jsonl`` when it is done.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from retrieval_report import write_report
from safetensors import safe_open
from torch import Tensor

from memlayer.plugins import default_plugins

BACKENDS = ["torch", "faiss", "faiss:index=ivf", "hnswlib"]
PIECE = 256
"""Vectors a lane in one write: a segment of 1,024 tokens."""

FLOOR_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Side:
    """Something that is timed.

    Attributes:
        name: as it stands in the table.
        search: gives ids ``(lanes, q, k)``, or anything where there is nothing to compare.
        append: writes ``(lanes, n, dim)`` into a full memory; None if it cannot.
        build: seconds per vector that filling it took.
    """

    name: str
    search: Callable[[Tensor, int], Any]
    append: Callable[[Tensor], None] | None
    build: float


def synchronize(device: str) -> None:
    """Wait for a GPU, so that the clock shows its time."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str) -> float:
    """Give the seconds that one call takes."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


# -------------------------------------------------------------------- what is compared


def floor_side(keys: Tensor) -> Side:
    """Make the matrix products and nothing else, in blocks that stay in a cache."""
    lanes, n, _ = keys.shape

    def products(queries: Tensor, _: int) -> None:
        q = queries.shape[1]
        width = min(n, max(64, FLOOR_BYTES // (4 * q)))
        memory = torch.empty(q * width, device=keys.device)
        for lane in range(lanes):
            for start in range(0, n, width):
                piece = keys[lane, start : start + width]
                out = memory[: q * len(piece)].view(q, len(piece))
                torch.mm(queries[lane], piece.T, out=out)

    return Side("floor", products, None, 0.0)


def paper_side(keys: Tensor) -> Side | str:
    """Search as the paper does: one flat index a head, one head after the other."""
    lanes, n, dim = keys.shape
    try:
        import faiss
    except ImportError:
        return "faiss is not installed"
    on_gpu = keys.device.type == "cuda"
    if on_gpu and not hasattr(faiss, "StandardGpuResources"):
        return "faiss has no GPU support here"
    began = time.perf_counter()
    indexes: list[Any] = [faiss.IndexFlatIP(dim) for _ in range(lanes)]
    if on_gpu:
        resources = faiss.StandardGpuResources()
        indexes = [faiss.index_cpu_to_gpu(resources, 0, index) for index in indexes]
    for index, lane in zip(indexes, keys, strict=True):
        index.add(lane.cpu().numpy())
    build = (time.perf_counter() - began) / (lanes * n)

    def search(queries: Tensor, k: int) -> Tensor:
        vectors = queries.cpu().numpy()
        found = [index.search(vectors[lane], k)[1] for lane, index in enumerate(indexes)]
        return torch.stack([torch.from_numpy(ids) for ids in found])

    def append(new: Tensor) -> None:
        for index, lane in zip(indexes, new.cpu().numpy(), strict=True):
            index.remove_ids(faiss.IDSelectorRange(0, len(lane)))
            index.add(lane)

    return Side("paper", search, None if on_gpu else append, build)


def loop_side(keys: Tensor) -> Side:
    """Search one head after the other with torch: the paper's way where there is no faiss-gpu."""

    def search(queries: Tensor, k: int) -> Tensor:
        lanes = range(len(keys))
        return torch.stack([(queries[lane] @ keys[lane].T).topk(k).indices for lane in lanes])

    return Side("loop of torch products", search, None, 0.0)


def backend_side(spec: str, keys: Tensor, asked: Tensor, seconds: float) -> Side | str:
    """Fill one of our backends and ask it, or say why it is not there."""
    name, options = parse_spec(spec)
    registry = default_plugins().backends
    reason = registry.unavailable_reason(name)
    if reason is not None:
        return reason
    lanes, n, dim = keys.shape
    backend: Any = registry.get(name)
    index = backend(lanes=lanes, dim=dim, device=str(keys.device), **options)
    began = time.perf_counter()
    for start in range(0, n, PIECE):
        index.add(keys[:, start : start + PIECE])
        spent = time.perf_counter() - began
        done = min(n, start + PIECE)
        if spent * n / done > seconds and spent > seconds / 10:
            return f"building would take {spent * n / done:.0f} s, more than --max-build"
    synchronize(str(keys.device))
    seconds_taken = time.perf_counter() - began
    if not index.exact:
        # Built when it is asked, and by what it is asked; the search itself is not counted.
        first, second = (timed(lambda: index.search(asked, 1), str(keys.device)) for _ in range(2))
        seconds_taken += max(0.0, first - second)
    build = seconds_taken / (lanes * n)

    def append(new: Tensor) -> None:
        index.remove_oldest(new.shape[1])
        index.add(new)
        if not index.exact:
            index.search(asked[:, :1], 1)

    return Side(spec, lambda queries, k: index.search(queries, k).ids, append, build)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``name:option=value,...``; values are JSON where they can be."""
    name, _, rest = spec.partition(":")
    options = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


# -------------------------------------------------------------------- measuring


def measure_size(arguments: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """Build everything at one size and time it; one record per side and number of queries."""
    torch.set_num_threads(arguments.threads)
    with safe_open(arguments.pairs, framework="pt") as file:
        n = tokens // arguments.chunk_size
        keys = file.get_slice("keys")[: arguments.lanes, :n].float().to(arguments.device)
        queries = file.get_slice("queries")[: arguments.lanes].float().to(arguments.device)
    # What engines learn from, and what all are measured with: a later passage.
    learnt, queries = queries.chunk(2, dim=1)
    if keys.shape[1] < n:
        raise SystemExit(f"{arguments.pairs} holds {keys.shape[1]} vectors a lane, {n} needed")
    paper = paper_side(keys)
    sides = [floor_side(keys), paper if isinstance(paper, Side) else loop_side(keys)]
    notes = {} if isinstance(paper, Side) else {"paper": paper}
    for spec in arguments.backends:
        side = backend_side(spec, keys, learnt.contiguous(), arguments.max_build)
        if isinstance(side, str):
            notes[spec] = side
            print(f"{tokens} tokens: {spec} left out: {side}", flush=True)
        else:
            sides.append(side)
    common = {
        "tokens": tokens,
        "vectors": n,
        "lanes": len(keys),
        "k": arguments.k,
        "device": device_name(arguments.device),
        "threads": arguments.threads,
        "notes": notes,
    }
    recalls = measure_recalls(sides, keys, queries.contiguous(), arguments.k)
    records = []
    for q in arguments.queries:
        measured = measure_queries(sides, queries[:, :q].contiguous(), arguments)
        records += [
            {**common, "queries": q, "recall": recalls[record["side"]], **record}
            for record in measured
        ]
    for side, per_vector in measure_appends(sides, keys, arguments):
        for record in records:
            if record["side"] == side:
                record["append"] = per_vector
    return records


def measure_recalls(
    sides: list[Side], keys: Tensor, queries: Tensor, k: int
) -> dict[str, float | None]:
    """Compare what all sides find with the true best."""
    best = exact_scores(keys, queries, k)
    return {side.name: recall(keys, queries, side.search(queries, k), best) for side in sides}


def measure_queries(
    sides: list[Side], queries: Tensor, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time all sides in turn, first round not counted."""
    k = arguments.k
    for side in sides:
        side.search(queries, k)
    seconds: list[list[float]] = [[] for _ in sides]
    began, rounds = time.perf_counter(), 0
    while rounds < arguments.rounds or time.perf_counter() - began < arguments.seconds:
        for side, kept in zip(sides, seconds, strict=True):
            kept.append(timed(partial(side.search, queries, k), arguments.device))
        rounds += 1
    return [
        {
            "side": side.name,
            "seconds": statistics.median(kept),
            "spread": [min(kept), max(kept)],
            # Of the same round: what slows the machine down slows both sides.
            "against_paper": quartiles([a / b for a, b in zip(kept, seconds[1], strict=True)]),
            "rounds": rounds,
            "build": side.build,
        }
        for side, kept in zip(sides, seconds, strict=True)
    ]


def quartiles(ratios: list[float]) -> list[float]:
    """Give median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [middle, low, high]


def exact_scores(keys: Tensor, queries: Tensor, k: int) -> Tensor:
    """Give the k-th best score of every query: ``(lanes, q, 1)``."""
    blocks = [
        torch.cat([(some @ lane.T).topk(k).values[:, -1:] for some in per_lane.split(128)])
        for lane, per_lane in zip(keys, queries, strict=True)
    ]
    return torch.stack(blocks)


def recall(keys: Tensor, queries: Tensor, ids: Tensor | None, kth: Tensor) -> float | None:
    """Give the share of ids whose score is among the true best, ties and rounding allowed."""
    if ids is None:
        return None
    ids = ids.to(keys.device)
    hits = 0
    for lane, (own_keys, own_queries) in enumerate(zip(keys, queries, strict=True)):
        found = own_keys[ids[lane].clamp(min=0)]  # (q, k, dim)
        scores = torch.einsum("qkd,qd->qk", found, own_queries)
        limit = kth[lane] - 1e-5 * (1 + kth[lane].abs())
        hits += int(((scores >= limit) & (ids[lane] >= 0)).sum())
    return hits / ids.numel()


def measure_appends(
    sides: list[Side], keys: Tensor, arguments: argparse.Namespace
) -> list[tuple[str, float]]:
    """Give seconds per vector of appending to a full memory that drops its oldest."""
    writing = [side for side in sides if side.append is not None]
    spent: dict[str, list[float]] = {side.name: [] for side in writing}
    vectors = keys.shape[0] * min(PIECE, keys.shape[1])
    for turn in range(arguments.appends):
        start = turn * PIECE % max(1, keys.shape[1] - PIECE)
        new = keys[:, start : start + PIECE].contiguous()
        for side in writing:
            append = side.append
            assert append is not None
            taken = timed(partial(append, new), arguments.device)
            spent[side.name].append(taken / vectors)
    # The mean: engines that tidy up now and then pay for it here.
    return [(name, statistics.fmean(taken)) for name, taken in spent.items()]


def device_name(device: str) -> str:
    """Say what the numbers are from."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Parse, measure each size in a process of its own, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, help="written by real_pairs.py")
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval"))
    parser.add_argument("--report", type=Path, help="only write table and figure of this folder")
    sizes = [4_096, 16_384, 65_536, 262_144, 1_048_576]
    parser.add_argument("--tokens", type=int, nargs="+", default=sizes)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME[:OPTION=VALUE]")
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--chunk-size", type=int, default=4)
    parser.add_argument("--k", type=int, default=16, help="chunks to find")
    parser.add_argument("--rounds", type=int, default=5, help="at least as many")
    parser.add_argument("--seconds", type=float, default=3.0, help="at least as long, per cell")
    parser.add_argument("--appends", type=int, default=20)
    parser.add_argument("--max-build", type=float, default=600.0, help="seconds, per backend")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.report is not None:
        write_report(arguments.report)
        return
    if arguments.pairs is None:
        parser.error("--pairs is needed: python benchmarks/real_pairs.py writes such a file")
    arguments.output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for tokens in arguments.tokens:
        with context.Pool(1) as pool:
            records = pool.apply(measure_size, (arguments, tokens))
        with (arguments.output / "retrieval.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    write_report(arguments.output)


if __name__ == "__main__":
    main()
