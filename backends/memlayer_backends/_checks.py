"""What every backend asks of its callers, in one place."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from memlayer.errors import ConfigError, ShapeError

OptionsT = TypeVar("OptionsT")


def read_options(kind: type[OptionsT], backend: str, options: Mapping[str, Any]) -> OptionsT:
    """Make a backend's options dataclass.

    Raises:
        ConfigError: if it has no such field.
    """
    known = sorted(item.name for item in fields(kind))  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"backend {backend!r} has no option {', '.join(map(repr, unknown))}; "
            f"known: {', '.join(known) or 'none'}"
        )
    return kind(**options)


def check_whole_number(name: str, value: object, *, minimum: int) -> None:
    """Refuse anything but an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be a whole number, at least {minimum}, got {value!r}")


def select_lanes(lanes: Sequence[int] | None, n_lanes: int) -> Tensor:
    """Give the chosen lanes ``(n,)``, int64; None chooses all.

    Raises:
        ShapeError: if a lane does not exist or is given twice.
    """
    if lanes is None:
        return torch.arange(n_lanes)
    try:
        chosen = [operator.index(lane) for lane in lanes]
    except TypeError as error:
        raise ShapeError(f"lanes must be a sequence of whole numbers, got {lanes!r}") from error
    if len(set(chosen)) < len(chosen) or any(not 0 <= lane < n_lanes for lane in chosen):
        raise ShapeError(
            f"lanes must be numbers from 0 to {n_lanes - 1}, each at most once, got {chosen}"
        )
    return torch.tensor(chosen, dtype=torch.int64)


def check_vectors(
    name: str, vectors: Tensor, *, lanes: int, dim: int, device: torch.device
) -> None:
    """Refuse vectors that are not ``(lanes, any, dim)`` of a float dtype on ``device``."""
    if vectors.ndim != 3 or vectors.shape[0] != lanes or vectors.shape[2] != dim:
        raise ShapeError(
            f"{name} must have shape ({lanes}, n, {dim}), that is (lanes, n, dim), "
            f"got {tuple(vectors.shape)}"
        )
    if not vectors.is_floating_point():
        raise ShapeError(f"{name} must have a float dtype, got {vectors.dtype}")
    here, wanted = vectors.device, device
    if here.type != wanted.type or (None not in (here.index, wanted.index) and here != wanted):
        raise ShapeError(
            f"{name} must be on {wanted}, got a tensor on {here}; move it with .to({str(wanted)!r})"
        )


def check_finite(keys: Tensor, lanes: Tensor) -> None:
    """Refuse float32 keys ``(len(lanes), n, dim)`` of which any is NaN or infinite."""
    finite = torch.isfinite(keys)
    if bool(finite.all()):
        return
    row, position, element = (~finite).nonzero()[0].tolist()
    raise ShapeError(
        f"keys must be finite in float32, got {keys[row, position, element].item()} in lane "
        f"{int(lanes[row])} at position {position} of the keys given; nothing was stored"
    )


def check_removal(n: object, counts: Tensor, lanes: Tensor) -> None:
    """Refuse to drop ``n`` vectors from lanes of which one holds fewer."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ShapeError(f"n must be a whole number, at least 0, got {n!r}")
    for lane, count in zip(lanes.tolist(), counts[lanes].tolist(), strict=True):
        if count < n:
            raise ShapeError(
                f"remove_oldest needs {n} vectors in every given lane, got {count} in lane "
                f"{lane}; nothing was dropped"
            )
