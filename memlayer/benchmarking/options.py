"""What a benchmark of backends measures: the one place where its defaults and units live.

No torch here: the command line reads the defaults to print its help.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memlayer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BackendSetup:
    """A backend with its options: ``faiss:index=ivf,nprobe=16`` on the command line.

    Attributes:
        name: as registered.
        options: what it is constructed with; JSON types.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> BackendSetup:
        """Read ``NAME`` or ``NAME:OPTION=VALUE,...``; a value that is no JSON is text.

        Raises:
            ConfigError: if it has another form.
        """
        name, colon, rest = text.partition(":")
        options: dict[str, Any] = {}
        for item in rest.split(",") if colon else ():
            key, equals, value = item.partition("=")
            if not key or not equals or key in options:
                raise ConfigError(
                    f"backend must be NAME or NAME:OPTION=VALUE,OPTION=VALUE, each option once, "
                    f"got {text!r}"
                )
            try:
                options[key] = json.loads(value)
            except ValueError:
                options[key] = value
        return cls(name=name, options=options)

    def __str__(self) -> str:
        options = ",".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.options.items()
        )
        return f"{self.name}:{options}" if options else self.name

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {"backend": self.name, "options": dict(self.options)}


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """Which backends are measured, at which sizes, with which vectors, for how long.

    Raises:
        ConfigError: if a field has a wrong value; the message names field, value and remedy.
    """

    backends: Sequence[BackendSetup] = ()
    """Empty: all installed ones that search themselves, each with the options that it calls worth
    measuring."""

    tokens: Sequence[int] = (4_096, 16_384, 65_536, 262_144)
    """Tokens of memory per row; measured from the smallest on. Multiples of ``chunk_size``."""

    chunk_size: int = 4
    """Tokens behind one vector."""

    top_k: int = 64
    """Tokens that a query finds. Multiple of ``chunk_size``."""

    queries: Sequence[int] = (1, 32, 1_024)
    """Queries of one search in each lane: 1 when decoding, a segment's tokens when reading."""

    rows: int = 1
    """Rows of a batch."""

    heads: int | None = None
    """Key/value heads of a row. None: 4, or as many as the pairs are of."""

    head_dim: int | None = None
    """Length of a vector. None: 64, or that of the pairs."""

    pairs: Path | None = None
    """A safetensors file of ``keys`` and ``queries`` of a real model. None: vectors drawn to be
    like such."""

    device: str = "auto"
    """Where queries come from: auto, cpu, cuda, ..."""

    rounds: int = 5
    """Times that every search is timed, all backends in turn."""

    budget: float = 60.0
    """Seconds. What would take longer than is left of them is not begun, and listed as skipped."""

    seed: int = 0
    """Of the vectors that are drawn."""

    def __post_init__(self) -> None:
        for name in ("chunk_size", "top_k", "rows", "rounds"):
            _check_count(name, getattr(self, name), 1)
        for name in ("heads", "head_dim"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), 1)
        _check_count("seed", self.seed, 0)
        if isinstance(self.budget, bool) or not self.budget > 0:
            raise ConfigError(f"budget must be a number of seconds above 0, got {self.budget!r}")
        for name in ("tokens", "queries"):
            values = getattr(self, name)
            for value in values:
                _check_count(name, value, 1)
            if not values:
                raise ConfigError(f"{name} must be at least one number, got none")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        object.__setattr__(self, "backends", tuple(self.backends))
        for name, numbers in (("tokens", self.tokens), ("top_k", (self.top_k,))):
            for value in numbers:
                if value % self.chunk_size:
                    raise ConfigError(
                        f"{name} must be multiples of chunk_size={self.chunk_size}, got {value}"
                    )
        if self.top_k > self.tokens[0]:
            raise ConfigError(
                f"top_k must be at most the smallest of tokens, got top_k={self.top_k} and "
                f"tokens={self.tokens[0]}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Vectors per lane, one number for each of `tokens`."""
        return tuple(number // self.chunk_size for number in self.tokens)

    @property
    def k(self) -> int:
        """Vectors that a query finds."""
        return self.top_k // self.chunk_size


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be a whole number, at least {minimum}, got {value!r}")
