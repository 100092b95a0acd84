r"""Keys and queries to measure with.

Approximate engines are judged wrongly by random vectors: a model's queries lie elsewhere than its
keys, and a few keys are among the best of most queries. So vectors are either taken from a model,
or drawn from a model of them, in which, for each lane,

    key   = m + A (sqrt(1/2) centre + sqrt(1/2) noise) S,   |m| = 15, S_i = 2.2 (1 + i)^-0.4 (1 - i/D)^(1/2)
    query = m' + A' noise S',   |m'| = 14, S'_0 = 5, S'_i = 2.2 (1 + i)^-0.3 (1 - i/D)^(1/4)

with random directions m and m', random axes A and A', normal noise, and one of 1,024 centres, the
n-th of which is drawn with a chance of about 1/n, since so are tokens. Norms and spectra are those
of SmolLM2-135M's memory layer on novels.
"""  # noqa: E501 - equations

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from memlayer.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

CENTRES = 1_024
"""Of the keys of one lane."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Keys of a memory and queries that a model would ask it.

    Attributes:
        keys: ``(lanes, n, dim)``, float32, on the CPU.
        queries: ``(lanes, q, dim)``, likewise.
        held: keys per lane that there are where these were taken from.
        source: where they are from, for whoever reads the results.
    """

    keys: Tensor
    queries: Tensor
    held: int
    source: str


def synthetic_pairs(*, lanes: int, keys: int, queries: int, dim: int, seed: int) -> Pairs:
    """Draw vectors that are like a model's.

    Args:
        lanes: rows times key/value heads.
        keys: n, per lane.
        queries: q, per lane.
        dim: length of a vector.
        seed: the same gives the same vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(dim)
    key_spectrum = 2.2 * (1 + index) ** -0.4 * (1 - index / dim) ** 0.5
    query_spectrum = 2.2 * (1 + index) ** -0.3 * (1 - index / dim) ** 0.25
    query_spectrum[0] = 5.0
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(lanes):
        centres = _normal((CENTRES, dim), generator)
        # The logarithm of a rank is uniform where its chance falls as 1/rank.
        ranks = (torch.rand(keys, generator=generator) * math.log(CENTRES)).exp().long() - 1
        spread = math.sqrt(0.5) * (centres[ranks] + _normal((keys, dim), generator))
        drawn[0].append(_placed(spread * key_spectrum, 15.0, generator))
        asked = _normal((queries, dim), generator) * query_spectrum
        drawn[1].append(_placed(asked, 14.0, generator))
    return Pairs(
        keys=torch.stack(drawn[0]),
        queries=torch.stack(drawn[1]),
        held=keys,
        source=f"synthetic, seed {seed}",
    )


def read_pairs(path: Path, *, sizes: Sequence[int], lanes: int | None) -> Pairs:
    """Read ``keys`` (lanes, n, dim) and ``queries`` (lanes, q, dim) of a safetensors file.

    Args:
        path: the file.
        sizes: keys per lane that are wanted; those of the largest that the file has are read.
        lanes: the first of them are read; None: all.

    Raises:
        DataError: if it is no such file, or has too few lanes or a vector that is not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in ("keys", "queries")]
            shapes = [tuple(part.get_shape()) for part in slices]
            _check_shapes(path, *shapes, lanes=lanes)
            some = slice(lanes or shapes[0][0])
            longest = max([size for size in sizes if size <= shapes[0][1]], default=0)
            keys = slices[0][some, :longest].float()
            queries = slices[1][some].float()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; give one with --pairs") from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} holds no keys and queries ({error!s:.80}); give a safetensors file of both"
        ) from error
    for name, tensor in (("keys", keys), ("queries", queries)):
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name} of {path} must be finite, got NaN or infinity")
    return Pairs(keys=keys, queries=queries, held=shapes[0][1], source=f"real, of {path.name}")


def _check_shapes(
    path: Path, keys: tuple[int, ...], queries: tuple[int, ...], *, lanes: int | None
) -> None:
    fit = len(keys) == len(queries) == 3 and (keys[0], keys[2]) == (queries[0], queries[2])
    if not fit or 0 in queries + keys:
        raise DataError(
            f"{path} must have keys (lanes, n, dim) and queries (lanes, q, dim), got {keys} and "
            f"{queries}"
        )
    if lanes is not None and lanes > keys[0]:
        raise DataError(f"{path} has {keys[0]} lanes, got rows x heads = {lanes}; ask for fewer")


def _placed(vectors: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    """Turn vectors ``(n, dim)`` onto random axes, around a random point at a distance from 0."""
    dim = vectors.shape[1]
    axes = torch.linalg.qr(_normal((dim, dim), generator)).Q
    centre: Tensor = distance * normalize(_normal((1, dim), generator), dim=-1)
    placed: Tensor = vectors @ axes.T + centre
    return placed


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
