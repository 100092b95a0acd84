"""What the keys and values of a bank are of, in one line of text."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYERS = re.compile(r" layers \[(\d+(?:, \d+)*)\]")


def bank_identity(fingerprint: str, memory_layers: Sequence[int]) -> str:
    """Name a backbone and the layers of it that a bank keeps."""
    return f"{fingerprint} layers {list(memory_layers)}"


def identity_layers(identity: str) -> tuple[int, ...] | None:
    """Give the memory layers that `bank_identity` named; None if it made no such name."""
    found = _LAYERS.search(identity)
    return None if found is None else tuple(int(layer) for layer in found[1].split(", "))
