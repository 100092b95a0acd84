"""What a perplexity evaluation measures: the one place where its defaults and units live.

No torch here: the command line reads the defaults to print its help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from memlayer.errors import ConfigError

Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


KNN_SETTINGS = ("knn_neighbors", "knn_weight", "knn_temperature")

_NO_COUNTS = {"fresh", "foreign_memory", "memory_sizes", "knn_lm", "knn_weight", "knn_temperature"}


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Windows, memory sizes, the bound and the statistics of one evaluation.

    None of these changes which tokens are scored.

    Raises:
        ConfigError: if a field has a wrong value; the message names field, value and remedy.
    """

    segment_length: int | None = None
    """Tokens of one window. None: the checkpoint's ``segment_length``, or the default of
    `memlayer.LongMemConfig` for a backbone alone."""

    stride: int | None = None
    """Tokens between the starts of two windows, at most ``segment_length``. None: as many, which
    gives fresh segments. Fewer: windows overlap, and a token has at least ``segment_length -
    stride`` tokens of local context."""

    fresh: bool = True
    """Score in fresh segments too where ``stride`` makes windows overlap."""

    memory_sizes: Sequence[int] | None = None
    """Tokens that memory holds, each size a condition. None: the checkpoint's ``memory_size``.
    Empty: no memory."""

    foreign_memory: bool = False
    """Also read the memory of another document, the next one: as many tokens as the own memory
    holds at the same place. What it gains is not this document's past."""

    knn_lm: bool = False
    """Also let the backbone read the same past as kNN-LM does: no training, no side network. As
    many contexts as the largest memory holds tokens. And mix the same votes into that memory's
    probabilities."""

    knn_neighbors: int = 64
    """Contexts that vote on a token."""

    knn_weight: float = 0.25
    """Of the votes against the backbone's own probability, between 0 and 1. The default is the
    paper's (arXiv:1911.00172) on Wikipedia."""

    knn_temperature: float = 1.0
    """Of squared distances between hidden states, before the softmax. Choose it on validation data:
    the scale of hidden states is each backbone's own."""

    dense_context: int | None = None
    """Tokens of context for the bare backbone, the bound to aim at. None: not measured."""

    dense_stride: int | None = None
    """Tokens between the starts of two dense windows. None: ``segment_length``, so that a token has
    at least ``dense_context - segment_length`` tokens of context. More is faster and a lower
    bound."""

    resamples: int = 10_000
    """Of each bootstrap."""

    seed: int = 0
    """Of the bootstraps."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _NO_COUNTS or value is None:
                continue
            _check_count(item.name, value, 0 if item.name == "seed" else 1)
        settings = {name: getattr(self, name) for name in KNN_SETTINGS}
        if not self.knn_lm and settings != {name: getattr(type(self), name) for name in settings}:
            given = ", ".join(f"{name}={value}" for name, value in settings.items())
            raise ConfigError(f"{', '.join(settings)} belong to knn_lm, got {given} without it")
        if not 0 < self.knn_weight < 1:
            raise ConfigError(f"knn_weight must be between 0 and 1, got {self.knn_weight}")
        if not 0 < self.knn_temperature < math.inf:
            raise ConfigError(f"knn_temperature must be above 0, got {self.knn_temperature}")
        if self.memory_sizes is not None:
            for size in self.memory_sizes:
                _check_count("memory_sizes", size, 1)
            object.__setattr__(self, "memory_sizes", tuple(sorted(set(self.memory_sizes))))


@dataclass(frozen=True, kw_only=True)
class Windowing:
    """The sizes of windows, resolved and checked against each other.

    Attributes:
        segment_length: T.
        stride: S, 1 to T.
        dense_context: tokens of a dense window, at least T, or None.
        dense_stride: 1 to ``dense_context``.
    """

    segment_length: int
    stride: int
    dense_context: int | None
    dense_stride: int

    @classmethod
    def resolve(
        cls, options: PerplexityOptions, *, segment_length: int, max_positions: int | None
    ) -> Windowing:
        """Fill in the defaults and check what fits together and fits the backbone.

        Args:
            options: what was asked for.
            segment_length: where the options leave it open.
            max_positions: tokens that a learned position table holds, or None.

        Raises:
            ConfigError: if sizes do not fit; the message names them.
        """
        length = options.segment_length or segment_length
        stride = options.stride or length
        dense = options.dense_context
        dense_stride = options.dense_stride or length
        if stride > length:
            raise ConfigError(
                f"stride must be at most segment_length={length}, got {stride}; a larger one "
                "would leave tokens out"
            )
        if options.dense_stride is not None and dense is None:
            raise ConfigError(
                f"dense_stride needs a dense_context, got dense_stride={dense_stride} alone"
            )
        if dense is not None and dense < length:
            raise ConfigError(
                f"dense_context must be at least segment_length={length}, got {dense}"
            )
        if dense is not None and dense_stride > dense:
            raise ConfigError(
                f"dense_stride must be at most dense_context={dense}, got {dense_stride}"
            )
        for name, value in (("segment_length", length), ("dense_context", dense)):
            if max_positions is not None and value is not None and value > max_positions:
                raise ConfigError(
                    f"{name} must be at most {max_positions}, the learned positions of this "
                    f"backbone, got {value}"
                )
        return cls(
            segment_length=length, stride=stride, dense_context=dense, dense_stride=dense_stride
        )


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, got {value}")
