"""Damage saved banks and checkpoints in thousands of ways, and load them.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0]

Each case must give an error of memlayer's own or load correctly: to what was saved, where no
checksum was made to fit, and to something that can be used in any case. No other exception, no case
over its time, no growth of memory, no file written by loading, none outside the directory by
saving.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mutations import copy_fresh, damage, reseal
from transformers import AutoConfig, AutoModelForCausalLM

import memlayer
from memlayer.memory import MemoryBank, bank_info, verify_bank
from memlayer.memory.reading import RowReading
from memlayer.plugins import default_plugins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

SECONDS = 10
MEGABYTES = 64


def make_bank(capacity: int = 64) -> MemoryBank:
    """Make the small bank that all saved ones are loaded into."""
    backend: Any = default_plugins().backends.get("torch")
    return MemoryBank(
        capacity=capacity,
        chunk_size=4,
        top_k=8,
        num_layers=2,
        num_key_value_heads=1,
        head_dim=4,
        make_index=lambda lanes: backend(lanes=lanes, dim=4, device="cpu"),
        slack=16,
        identity="fuzz",
    )


def fill(bank: MemoryBank, tokens: int, rows: int, seed: int) -> None:
    """Write tokens of a document, every second row a few less."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, rows, 1, tokens, 4, generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.9
    number = bank.document_number(f"document {seed}")
    sources = torch.stack(
        [torch.arange(tokens), torch.full((tokens,), number), torch.arange(tokens)], dim=1
    )
    place = RowReading(document=number, offset=tokens, open_ids=torch.arange(5))
    sources = sources.expand(rows, -1, -1)
    bank.write(list(keys), list(values), mask, sources, reading=(place,) * rows)


def make_originals(scratch: Path, backbone: PreTrainedModel) -> dict[str, Path]:
    """Save two banks and a checkpoint."""
    simple, many = make_bank(), make_bank()
    fill(simple, 30, 1, seed=0)
    simple.save(scratch / "simple bank")
    for seed, tokens in enumerate((40, 9, 3)):
        fill(many, tokens, 2, seed=seed)
        many.save(scratch / "bank of shards", indexes="save")
    model = memlayer.wrap(
        backbone,
        memlayer.LongMemConfig(
            backend="torch", memory_size=64, top_k=8, segment_length=16, memory_layers=(1,)
        ),
    )
    model.save_pretrained(scratch / "checkpoint")
    model.unwrap()
    return {name: scratch / name for name in ("simple bank", "bank of shards", "checkpoint")}


def use_bank(case: Path, capacity: int, verify: bool) -> list[Any]:
    """Load a bank and do with it what can be done; give what it answers."""
    bank = make_bank(capacity)
    bank.load(case, verify=verify)
    answers: list[Any] = [bank.lengths.tolist(), bank.documents]
    if bank.rows:
        queries = torch.randn(bank.rows, 1, 3, 4, generator=torch.Generator().manual_seed(9))
        for layer in range(2):
            found = bank.retrieve(queries, layer=layer)
            keys, values, mask = found.gather()
            assert not verify or bool(torch.isfinite(keys[mask]).all())
            answers += [found.ids.tolist(), values[mask].tolist(), bank.look_up(found).tolist()]
        fill(bank, 7, bank.rows, seed=5)
        bank.retrieve(queries)
    return answers


def use_checkpoint(case: Path, backbone: PreTrainedModel) -> list[Any]:
    """Load a checkpoint and give its logits."""
    model = memlayer.load(case, backbone=backbone)
    try:
        with torch.no_grad():
            return [model(torch.arange(3, 9).unsqueeze(0)).logits.tolist()]
    finally:
        model.unwrap()


class Watch:
    """Notes what Python opens for writing, makes, moves or removes while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.touched: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and not isinstance(path, int):
                self.touched.append(os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link"):
            self.touched += [os.fsdecode(one) for one in arguments if isinstance(one, (str, bytes))]

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Give the list that fills while the block runs."""
        self.touched, self.on = [], True
        try:
            yield self.touched
        finally:
            self.on = False


class TooSlowError(BaseException):
    """A case ran out of its time."""


def _too_slow(*_: object) -> None:
    raise TooSlowError


def snapshot(scratch: Path, case: Path) -> dict[str, bytes]:
    """Give every file beside the case's own."""
    return {
        str(path): path.read_bytes()
        for path in scratch.rglob("*")
        if path.is_file() and not path.is_relative_to(case)
    }


class Fuzzer:
    """Runs cases and counts what came of them."""

    def __init__(self, scratch: Path, seed: int) -> None:
        config = AutoConfig.for_model(
            "llama", vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        self.backbone = AutoModelForCausalLM.from_config(config).eval()
        self.scratch, self.seed = scratch, seed
        self.case = scratch / "case"
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.watch = Watch()
        (scratch / "outside.txt").write_text("not yours")
        self.originals = make_originals(scratch, self.backbone)
        self.expected = {name: self.use(name, place) for name, place in self.originals.items()}

    def use(self, name: str, place: Path, capacity: int = 64, verify: bool = True) -> list[Any]:
        """Load one kind of directory."""
        if name == "checkpoint":
            return use_checkpoint(place, self.backbone)
        return use_bank(place, capacity, verify)

    def run(self, number: int) -> None:
        """Damage one copy, load it, and note what is wrong with that."""
        draw = random.Random(f"{self.seed} {number}")
        name = draw.choice(sorted(self.originals))
        copy_fresh(self.originals[name], self.case)
        done = damage(self.case, draw)
        sealed = draw.random() < 0.6 and reseal(self.case)
        verify, capacity = draw.random() < 0.8, draw.choice([64, 64, 16, 256])
        label = f"case {number}, {name}: {'; '.join(done)}{' (resealed)' if sealed else ''}"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with self.watch.watching() as touched:
                outcome = self._load(name, label, capacity, verify, sealed)
            # The Hub is asked for what is no directory; nothing else may be written.
            if touched:
                self.failures.append(f"{label}: loading touched {touched[:3]}")
            if name != "checkpoint":
                self._look(label)
                if draw.random() < 0.2:
                    self._save(label)
        except TooSlowError:
            outcome = "too slow"
            self.failures.append(f"{label}: more than {SECONDS} s")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEGABYTES and number > 100:
            self.failures.append(f"{label}: memory grew by {grown:.0f} MiB")
        self.counts[f"{'checkpoint' if name == 'checkpoint' else 'bank'}, {outcome}"] += 1
        self.counts["resealed"] += sealed

    def _load(self, name: str, label: str, capacity: int, verify: bool, sealed: bool) -> str:
        try:
            answers = self.use(name, self.case, capacity, verify)
        except memlayer.MemlayerError as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, MemoryError) or "allocate" in str(cause):
                    self.failures.append(f"{label}: too much memory was asked for: {cause}")
                cause = cause.__cause__
            if len(str(error)) > 1000 or "\n" in str(error).strip():
                self.failures.append(f"{label}: no sentence but {str(error)[:200]!r}")
            return "refused"
        except Exception:
            self.failures.append(f"{label}: {traceback.format_exc()}")
            return "another exception"
        whole = capacity == 64 and verify
        if whole and not sealed and json.dumps(answers) != json.dumps(self.expected[name]):
            self.failures.append(f"{label}: loaded, but to something else")
        return "loaded"

    def _look(self, label: str) -> None:
        """Look at a bank without a model; only errors of ours may come."""
        try:
            json.dumps(verify_bank(self.case).to_dict())
            json.dumps(bank_info(self.case).to_dict())
        except memlayer.MemlayerError:
            pass
        except Exception:
            self.failures.append(f"{label}: looking: {traceback.format_exc()}")

    def _save(self, label: str) -> None:
        """Save a bank over what is there: it must then be whole, and the rest as before."""
        before = snapshot(self.scratch, self.case)
        bank = make_bank()
        fill(bank, 30, 1, seed=7)
        try:
            with self.watch.watching() as touched:
                bank.save(self.case)
            assert verify_bank(self.case).whole
        except memlayer.MemlayerError:
            self.counts["saving over it refused"] += 1
        except Exception:
            self.failures.append(f"{label}: saving: {traceback.format_exc()}")
        outside = [one for one in touched if one.startswith("/") and self.case.name not in one]
        if outside or snapshot(self.scratch, self.case) != before:
            self.failures.append(f"{label}: saving touched what is outside: {outside[:3]}")


def main() -> None:
    """Parse, damage, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGALRM, _too_slow)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer = Fuzzer(Path(scratch).resolve(), arguments.seed)
        # What asks for more than a gigabyte beyond what is there is stopped.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
        for number in range(arguments.first, arguments.first + arguments.cases):
            fuzzer.run(number)
        shutil.rmtree(fuzzer.case, ignore_errors=True)
    for failure in fuzzer.failures[:20]:
        print(failure, end="\n\n")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(fuzzer.counts.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{arguments.cases} cases: {counts}; {len(fuzzer.failures)} failures; "
        f"peak {peak:.0f} MiB, {time.perf_counter() - began:.0f} s"
    )
    sys.exit(bool(fuzzer.failures))


if __name__ == "__main__":
    main()
