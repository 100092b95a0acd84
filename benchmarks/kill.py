"""Kill a process that appends to a bank, at random moments, and look at what is left.

    python benchmarks/kill.py [--kills 200] [--seed 0]

A process writes numbered tokens to a bank on disk and, after each save, acknowledges how many there
are. It is ended by SIGKILL at a random moment and another one goes on from the directory. After
every kill the directory must verify and hold a prefix of what was sent, with nothing acknowledged
lost. Needs os.fork: each process is a copy of this one, so that torch is imported only once.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memlayer.memory import MemoryBank, bank_exists, verify_bank
from memlayer.plugins import default_plugins

CAPACITY, CHUNK, HEADS, DIM = 2048, 4, 2, 8
LONGEST_WRITE = 150
_NUMBER = struct.Struct("<q")


def make_bank() -> MemoryBank:
    """Make an empty bank, small enough that its oldest chunks are dropped on the way."""
    backend: Any = default_plugins().backends.get("torch")
    return MemoryBank(
        capacity=CAPACITY,
        chunk_size=CHUNK,
        top_k=16,
        num_layers=1,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        make_index=lambda lanes: backend(lanes=lanes, dim=DIM, device="cpu"),
        slack=64,
        identity="numbered tokens",
    )


def keys_of(offsets: torch.Tensor) -> torch.Tensor:
    """Give keys ``(1, H_kv, n, D)`` from which each token's number can be told."""
    plane = torch.sin(offsets.double().unsqueeze(1) * (1 + torch.arange(DIM)) * 0.37)
    return plane.float().expand(1, HEADS, -1, -1)


def tokens_in(bank: MemoryBank) -> int:
    """Count the tokens ever written to a bank's only row."""
    return bank.reading[0].offset if bank.reading else 0


def append_for_ever(directory: Path, acknowledge: int, seed: int) -> None:
    """Write, save, acknowledge, until killed."""
    from memlayer.memory.reading import RowReading

    draw = random.Random(seed)
    bank = make_bank()
    if bank_exists(directory):
        bank.load(directory)
    end = tokens_in(bank)
    while True:
        offsets = torch.arange(end, end + draw.randint(1, LONGEST_WRITE))
        end += len(offsets)
        keys = keys_of(offsets)
        sources = torch.stack([offsets % 97, torch.full_like(offsets, -1), offsets], dim=1)
        bank.write(
            keys, -keys, None, sources.unsqueeze(0), reading=(RowReading(document=-1, offset=end),)
        )
        bank.save(directory, indexes=draw.choice(["rebuild", "rebuild", "save"]))
        os.write(acknowledge, _NUMBER.pack(end))


@dataclass
class Found:
    """What the kills left, in numbers.

    Attributes:
        kills: processes ended.
        saves: acknowledged saves.
        amid: kills amid a save: files that the manifest does not name, or not any more, were left.
        unacknowledged: kills after which a save was there that had not been acknowledged yet.
        before_any: kills before anything was saved.
    """

    kills: int = 0
    saves: int = 0
    amid: int = 0
    unacknowledged: int = 0
    before_any: int = 0


def kill_one(directory: Path, draw: random.Random) -> list[int]:
    """Start a writer, kill it, and give what it acknowledged."""
    readable, writable = os.pipe()
    seed = draw.randrange(2**32)
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            append_for_ever(directory, writable, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writable)
    # So many saves, and then at any moment of the next one or two, however fast the machine is.
    data, began = b"", time.perf_counter()
    saves = draw.randrange(8)
    while len(data) < saves * _NUMBER.size:
        if not select.select([readable], [], [], 60)[0]:
            raise SystemExit("a writer has saved nothing for a minute")
        part = os.read(readable, 65536)
        if not part:
            raise SystemExit("a writer ended before it was killed")
        data += part
    mean = (time.perf_counter() - began) / saves if saves else 0.05
    time.sleep(draw.uniform(0.0, 2 * mean))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise SystemExit("a writer ended before it was killed")
    while part := os.read(readable, 65536):
        data += part
    os.close(readable)
    return [number for (number,) in _NUMBER.iter_unpack(data)]


def check(directory: Path, acknowledged: int, found: Found) -> None:
    """Raise unless the directory is whole and holds a prefix with all that was acknowledged."""
    if not bank_exists(directory):
        assert acknowledged == 0, f"{acknowledged} tokens were acknowledged, there is no bank"
        found.before_any += 1
        return
    report = verify_bank(directory)
    assert report.whole, report.problems
    present = {path.name for path in directory.iterdir()}
    named = {name.partition("/")[0] for name in names_in(directory)}
    found.amid += bool(present - named - {"lock", "manifest.json"})
    bank = make_bank()
    bank.load(directory)
    end = tokens_in(bank)
    assert end >= acknowledged, f"{acknowledged} tokens were acknowledged, {end} are there"
    found.unacknowledged += end > acknowledged
    chunks = end // CHUNK
    first = max(0, chunks - CAPACITY // CHUNK)
    assert bank.lengths.tolist() == [min(end - first * CHUNK, CAPACITY)]
    kept = bank._held_ring().read(torch.tensor([first]), torch.tensor([chunks]))
    offsets = torch.arange(first * CHUNK, chunks * CHUNK)
    assert torch.equal(kept.sources[0, :, :, 2].flatten(), offsets)
    assert torch.equal(kept.keys[0].flatten(2, 3), keys_of(offsets))
    assert torch.equal(kept.values[0].flatten(2, 3), -keys_of(offsets))
    if chunks:
        # Each chunk is found by its own key, under its own number.
        mean = keys_of(offsets).unflatten(2, (-1, CHUNK)).mean(3)
        scores = bank.retrieve(mean[:, :, -8:])
        best = (mean[0, 0, -8:] @ mean[0, 0].T).argmax(dim=1) + first
        assert torch.equal(scores.ids[0, 0, :, 0], best)


def names_in(directory: Path) -> list[str]:
    """Give the files that a bank's manifest names."""
    from memlayer.memory.manifest import read_manifest

    return [file.name for file in read_manifest(directory).files()]


def main() -> None:
    """Parse, kill, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, found, acknowledged = random.Random(arguments.seed), Found(), 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "bank"
        make_bank().save(Path(scratch) / "warm")  # All that a writer needs is imported now.
        verify_bank(Path(scratch) / "warm")
        for _ in range(arguments.kills):
            numbers = kill_one(directory, draw)
            acknowledged = max([acknowledged, *numbers])
            found.kills += 1
            found.saves += len(numbers)
            check(directory, acknowledged, found)
    print(
        f"{found.kills} kills, {found.saves} acknowledged saves of {acknowledged} tokens, "
        f"0 lost, 0 damaged; {found.amid} kills left files of a save under way, "
        f"{found.unacknowledged} a finished one that was not acknowledged, "
        f"{found.before_any} came before anything was saved; "
        f"{time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    if not hasattr(os, "fork"):
        sys.exit("this needs os.fork")
    main()
