"""How much of an inspection is kept."""

from __future__ import annotations

from dataclasses import dataclass, fields

from memlayer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """How much of what was read is kept and shown.

    Raises:
        ConfigError: if a number is below 1.
    """

    chunks_per_token: int = 8
    """Chunks kept of those that a token read, the ones it read most."""

    passages: int = 12
    """Passages kept of those that all tokens together read most."""

    context: int = 24
    """Tokens of text shown on either side of a chunk."""

    predictions: int = 3
    """Likeliest next tokens kept, with memory and without."""

    place_bins: int = 48
    """Equal parts of memory that `TokenReading.places` tells apart."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise ConfigError(f"{item.name} must be at least 1, got {getattr(self, item.name)}")
