"""One backend's vectors in one file.

``index.safetensors`` holds ``keys`` (total, dim) float32, lane after lane and oldest first, with
``counts`` and ``first_ids`` (lanes,) int64; its metadata is a JSON header. What a search structure
adds is built again from the vectors, so any backend reads what any other wrote, no library's own
binary format is parsed, and one rename makes the write atomic.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memlayer.errors import MemoryFormatError

FORMAT_VERSION = 1
FILE_NAME = "index.safetensors"
_METADATA_KEY = "memlayer"


@dataclass(frozen=True)
class SavedKeys:
    """The vectors of all lanes.

    Attributes:
        keys: ``(counts.sum(), dim)``, float32. Lane after lane, oldest first.
        counts: ``(lanes,)``, int64.
        first_ids: ``(lanes,)``, int64. Id of each lane's oldest vector.
    """

    keys: Tensor
    counts: Tensor
    first_ids: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors under the names that they have in the file."""
        return {"keys": self.keys, "counts": self.counts, "first_ids": self.first_ids}

    def digest(self) -> str:
        """Give the SHA-256 of the contents."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.tensors().items()):
            digest.update(tensor.numpy().data)
        return digest.hexdigest()


def write_keys(
    directory: Path, saved: SavedKeys, *, backend: str, options: Mapping[str, Any]
) -> None:
    """Write the file, whole or not at all.

    Args:
        directory: exists.
        saved: contiguous tensors on the CPU.
        backend: name of the backend that writes, for whoever inspects the file.
        options: its options, likewise.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "backend": backend,
        "options": dict(options),
        "lanes": len(saved.counts),
        "dim": saved.keys.shape[1],
        "sha256": saved.digest(),
    }
    unfinished = Path(directory) / f"{FILE_NAME}.{os.getpid()}.part"
    try:
        save_file(saved.tensors(), unfinished, metadata={_METADATA_KEY: json.dumps(header)})
        os.replace(unfinished, Path(directory) / FILE_NAME)
    finally:
        unfinished.unlink(missing_ok=True)


def read_keys(directory: Path, *, lanes: int, dim: int) -> SavedKeys:
    """Read what `write_keys` wrote.

    Raises:
        MemoryFormatError: if the file is missing, damaged or of other lanes or dim.
    """
    path = Path(directory) / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata[_METADATA_KEY])
        saved = SavedKeys(**tensors)
        _check_header(path, header, lanes=lanes, dim=dim)
    except FileNotFoundError as error:
        raise MemoryFormatError(f"{path} does not exist; save an index there first") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, MemoryFormatError):
            raise
        raise MemoryFormatError(
            f"{path} is not a whole memlayer index ({error!s:.80}); write it again"
        ) from error
    _check_contents(path, saved, header)
    return saved


def _check_header(path: Path, header: Any, *, lanes: int, dim: int) -> None:
    version, _ = header["format_version"], header["sha256"]
    if version != FORMAT_VERSION:
        raise MemoryFormatError(
            f"{path} has format_version {version!r:.40}, this memlayer reads {FORMAT_VERSION}; "
            "install the memlayer that wrote it"
        )
    if (header["lanes"], header["dim"]) != (lanes, dim):
        raise MemoryFormatError(
            f"{path} holds {header['lanes']!s:.40} lanes of dim {header['dim']!s:.40}, this "
            f"backend has {lanes} lanes of dim {dim}; load it with the model that wrote it"
        )


def _check_contents(path: Path, saved: SavedKeys, header: Mapping[str, Any]) -> None:
    shapes_agree = (
        saved.keys.dtype == torch.float32
        and saved.counts.dtype == saved.first_ids.dtype == torch.int64
        and saved.counts.shape == saved.first_ids.shape == (header["lanes"],)
        and bool((saved.counts >= 0).all() and (saved.first_ids >= 0).all())
        and saved.keys.shape == (int(saved.counts.sum()), header["dim"])
    )
    if not shapes_agree or saved.digest() != header["sha256"]:
        raise MemoryFormatError(
            f"{path} is damaged: its contents are not what its header says; write it again"
        )
