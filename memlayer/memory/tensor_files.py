"""The safetensors files of a bank: written to the disk, and mapped into memory when they are read.

Nothing is believed of a file before it is checked: its size, on request its checksum, then the
names, shapes and types of its tensors, and only then is anything taken from it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from memlayer.errors import MemoryFormatError
from memlayer.memory.manifest import SavedFile

if TYPE_CHECKING:
    from torch import Tensor

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Expected:
    """What a tensor in a file has to be."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> SavedFile:
    """Write one file and wait until it is on the disk.

    Raises:
        OSError: if it cannot be written.
    """
    path = directory / name
    try:
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, path)
    except SafetensorError as error:
        # The library gives the operating system's number in its text only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
    return describe_file(directory, name)


def describe_file(directory: Path, name: str) -> SavedFile:
    """Force a written file to the disk, and give what a manifest says of it."""
    with (directory / name).open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SavedFile(name=name, size=os.fstat(file.fileno()).st_size, sha256=digest)


def check_file(directory: Path, file: SavedFile, *, verify: bool) -> None:
    """Check a file against what the manifest says of it.

    Args:
        directory: the bank's.
        file: what the manifest says.
        verify: compare the checksum too, which reads the whole file.

    Raises:
        MemoryFormatError: if it is missing, no ordinary file, or of another size or content.
    """
    path = directory / file.name
    try:
        if path.exists() and not path.is_file():
            raise MemoryFormatError(f"{path} is damaged: it is no ordinary file")
        size = path.stat().st_size
        if size != file.size:
            raise MemoryFormatError(
                f"{path} has {size:,} bytes instead of {file.size:,}: it was truncated or changed"
            )
        if verify:
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != file.sha256:
                raise MemoryFormatError(f"{path} does not match its checksum: it was changed")
    except FileNotFoundError as error:
        raise MemoryFormatError(f"{path} is missing") from error
    except OSError as error:
        raise MemoryFormatError(f"{path} cannot be read: {error.strerror}") from error


def map_tensors(
    directory: Path, file: SavedFile, expected: Mapping[str, Expected], *, verify: bool
) -> dict[str, Tensor]:
    """Check a file and map its tensors, which are then read from the disk as they are used.

    The mapping is private: who writes to a tensor gets a copy of the page, and the file stays.

    Raises:
        MemoryFormatError: if it is not what the manifest says, or lacks an expected tensor.
    """
    check_file(directory, file, verify=verify)
    path = directory / file.name
    try:
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
            if names != set(expected):
                raise MemoryFormatError(
                    f"{path} is damaged: it must hold {', '.join(sorted(expected))}, got "
                    f"{', '.join(sorted(names))[:80]}"
                )
            for name, wanted in expected.items():
                found = opened.get_slice(name)
                shape, kind = tuple(found.get_shape()), found.get_dtype()
                if (kind, shape) != (_TYPE_NAMES[wanted.dtype], wanted.shape):
                    raise MemoryFormatError(
                        f"{path} is damaged: {name} must be {_TYPE_NAMES[wanted.dtype]} of shape "
                        f"{wanted.shape}, got {kind} of shape {shape}"
                    )
            return {name: opened.get_tensor(name) for name in expected}
    except FileNotFoundError as error:
        raise MemoryFormatError(f"{path} is missing") from error
    except (OSError, SafetensorError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, MemoryFormatError):
            raise
        raise MemoryFormatError(f"{path} is damaged: {error}") from error


def is_finite(tensor: Tensor) -> bool:
    """Say whether no element is NaN or infinite, a part at a time: a mapped file may be large."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(2**22))
