"""What one run of the ``memlayer`` command carries along, as the context's object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memlayer.plugins import Plugins
    from memlayer.registry import Source


@dataclass
class Session:
    """The plug-ins in use and the global options."""

    plugins: Plugins
    commands: dict[str, Source] = field(default_factory=dict)
    """Every command's name, and where it comes from."""
    debug: bool = False
    """Whether errors show their traceback."""
