"""Ways to damage a directory of JSON and safetensors files, for ``fuzz.py``.

Each takes a directory and a random generator, changes something in place, and returns a short name
of what it did. `reseal` then makes the checksums fit the damage, so that what is behind them is
reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], str]

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "../outside", "../../../etc/passwd",
    "/etc/passwd", "..", ".", "a/b", "shard-00000001.safetensors\0", "x" * 100_000, "\ud800",
    [], {}, [[]], [1e9], [-1], {"": None}, [0] * 5000,
)  # fmt: skip

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "U64", "F8_E4M3", "X", "")


def _pick_file(directory: Path, draw: random.Random, suffix: str = "") -> Path:
    files = sorted(
        path for path in directory.rglob("*") if path.is_file() and path.name.endswith(suffix)
    )
    return draw.choice([path for path in files if path.name != "lock"])


# ------------------------------------------------------------------ bytes


def flip_bits(directory: Path, draw: random.Random) -> str:
    """Flip one to eight bits of a file."""
    path = _pick_file(directory, draw)
    data = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 8)):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"flip bits of {path.name}"


def cut_tail(directory: Path, draw: random.Random) -> str:
    """Cut a file short, at times to nothing."""
    path = _pick_file(directory, draw)
    data = path.read_bytes()
    path.write_bytes(data[: draw.choice([0, 1, 8, draw.randrange(len(data) + 1)])])
    return f"cut {path.name}"


def append_bytes(directory: Path, draw: random.Random) -> str:
    """Make a file longer."""
    path = _pick_file(directory, draw)
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice([1, 8, 1000])))
    return f"append to {path.name}"


def overwrite_block(directory: Path, draw: random.Random) -> str:
    """Overwrite a block by noise, by zeros, or by another block of the file."""
    path = _pick_file(directory, draw)
    data = bytearray(path.read_bytes())
    start, length = draw.randrange(len(data) + 1), draw.choice([1, 8, 64, 512])
    block = data[start : start + length]
    kind = draw.choice(["noise", "zeros", "copy"])
    if kind == "noise":
        block[:] = draw.randbytes(len(block))
    elif kind == "zeros":
        block[:] = bytes(len(block))
    else:
        other = draw.randrange(len(data) + 1)
        block = data[other : other + length]
    data[start : start + length] = block
    path.write_bytes(data)
    return f"overwrite {path.name} by {kind}"


def swap_files(directory: Path, draw: random.Random) -> str:
    """Exchange the contents of two files."""
    one, other = (_pick_file(directory, draw, ".safetensors") for _ in range(2))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"swap {one.name} and {other.name}"


def replace_file(directory: Path, draw: random.Random) -> str:
    """Put something that is no such file in a file's place, or nothing."""
    path = _pick_file(directory, draw)
    kind = draw.choice(["nothing", "directory", "link", "pipe", "loop", "noise"])
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(directory.parent / "outside.txt")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "noise":
        path.write_bytes(draw.randbytes(draw.choice([3, 100, 5000])))
    return f"replace {path.name} by {kind}"


# ------------------------------------------------------------------ JSON


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List every container and key within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = []
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += _places(value[key])
    return found


def change_json(directory: Path, draw: random.Random) -> str:
    """Change, drop, add or repeat something in a JSON file."""
    path = _pick_file(directory, draw, ".json")
    content = json.loads(path.read_bytes())
    container, key = draw.choice(_places(content))
    kind = draw.choice(["value", "value", "value", "near", "near", "drop", "add", "repeat"])
    old = container[key]
    if kind == "drop":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        container[draw.choice(["x", "format_version", "__proto__", "name"])] = draw.choice(HOSTILE)
    elif kind == "repeat" and isinstance(container, list):
        container[key:key] = [old] * draw.choice([1, 2, 500])
    elif kind == "near" and isinstance(old, (int, float)):
        container[key] = old + draw.choice([-2, -1, 1, 2, 1000, 10**9])
    elif kind == "near" and isinstance(old, str):
        container[key] = draw.choice([old[:-1], old + "x", old[::-1], old.upper(), f"../{old}"])
    else:
        container[key] = draw.choice(HOSTILE)
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{kind} of {key!r:.20} in {path.name}"


def hostile_json(directory: Path, draw: random.Random) -> str:
    """Put text into a JSON file that parsers choke on."""
    path = _pick_file(directory, draw, ".json")
    deep = draw.choice([500, 5000, 200_000])
    texts = {
        "deep lists": "[" * deep + "]" * deep,
        "deep objects": '{"a":' * deep + "1" + "}" * deep,
        "a field of deep lists": json.dumps(json.loads(path.read_bytes()))[:-1]
        + ', "x": ' + "[" * deep + "]" * deep + "}",
        "a huge number": '{"format_version": ' + "9" * 10_000 + "}",
        "a huge exponent": '{"format_version": 1e999999999}',
        "no object": draw.choice(["", "null", "3", '"text"', "[]", "{", "\ufeff{}"]),
        "repeated keys": '{"format_version": 1, "format_version": 2}',
    }  # fmt: skip
    name = draw.choice(sorted(texts))
    path.write_text(texts[name], encoding="utf-8")
    return f"{name} in {path.name}"


# ------------------------------------------------------------------ safetensors


def change_header(directory: Path, draw: random.Random) -> str:
    """Change the header of a safetensors file: lengths, offsets, shapes, types, names."""
    path = _pick_file(directory, draw, ".safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    kind = draw.choice(
        ["length", "offsets", "overlap", "shape", "dtype", "rename", "drop", "body", "metadata"]
    )
    if kind == "offsets":
        low, high = entry["data_offsets"]
        huge = [0, 2**40, 2**63 - 1, 2**64 - 1, -1, high, low, high + 1, low - 1]
        entry["data_offsets"] = [draw.choice(huge), draw.choice(huge)]
    elif kind == "overlap":
        entry["data_offsets"] = header[draw.choice(names)]["data_offsets"]
    elif kind == "shape":
        sizes = [0, 1, 2**20, 2**40, 2**63, -1, *entry["shape"]]
        entry["shape"] = [draw.choice(sizes) for _ in range(draw.randint(0, 8))]
    elif kind == "dtype":
        entry["dtype"] = draw.choice(_DTYPES)
    elif kind == "rename":
        header[draw.choice(["x", "", "keys", "../x", "x" * 5000])] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "body":
        low, high = entry["data_offsets"]
        block = draw.choice([b"\xff", b"\x7f\xc0\x7f\xc0"[: draw.randint(1, 4)], b"\x00"])
        body = body[:low] + (block * (high - low))[: high - low] + body[high:]
    elif kind == "metadata":
        header["__metadata__"] = draw.choice([{}, {"a": "b" * 10_000}, {"memlayer": "{}"}, 3, None])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = len(text)
    if kind == "length":
        size = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", size) + text + body)
    return f"{kind} of {name} in {path.name}"


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, cut_tail, append_bytes, overwrite_block, swap_files, replace_file, change_json,
    change_json, change_json, hostile_json, change_header, change_header,
)  # fmt: skip


def damage(directory: Path, draw: random.Random) -> list[str]:
    """Damage a directory once, at times twice, and give what was done."""
    done = [draw.choice(MUTATIONS)(directory, draw)]
    if draw.random() < 0.25:
        # The first may have left nothing that a second can be done to.
        with suppress(Exception):
            done.append(draw.choice(MUTATIONS)(directory, draw))
    return done


# ------------------------------------------------------------------ making checksums fit


def reseal(directory: Path) -> bool:
    """Make the checksums of a bank or a checkpoint fit its files; False where that cannot be."""
    parts = ("manifest.json", "adapter_config.json", "adapter_model.safetensors")
    if any((directory / name).exists() and not (directory / name).is_file() for name in parts):
        return False  # A pipe would be waited for.
    try:
        if (directory / "manifest.json").exists():
            _reseal_bank(directory)
        else:
            _reseal_checkpoint(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _reseal_bank(directory: Path) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_bytes())
    files = [shard["file"] for shard in content["shards"]]
    files += [content["state"]] if content["state"] else []
    files += content["indexes"]["files"] if content["indexes"] else []
    for file in files:
        place = directory / file["name"]
        if place.is_file() and place.resolve().is_relative_to(directory.resolve()):
            data = place.read_bytes()
            file |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.pop("checksum", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["checksum"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")


def _reseal_checkpoint(directory: Path) -> None:
    path = directory / "adapter_config.json"
    content = json.loads(path.read_bytes())
    data = (directory / "adapter_model.safetensors").read_bytes()
    content["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(content), encoding="utf-8")


def copy_fresh(original: Path, case: Path) -> None:
    """Put an undamaged copy of a directory in place of whatever is there."""
    if case.exists():
        shutil.rmtree(case)
    shutil.copytree(original, case)
