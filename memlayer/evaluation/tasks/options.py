"""What every evaluation task can be told: the one place of these defaults. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from memlayer.evaluation.tasks.task import at_least


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which items, and under which conditions.

    Raises:
        ConfigError: if a field has a wrong value.
    """

    max_items: int | None = None
    """Items to score, spread evenly over the task's. None: all."""

    segment_length: int | None = None
    """Tokens of the local window. None: the checkpoint's. What a prompt has beyond it goes to
    memory, and is cut off for conditions without one."""

    memory_size: int | None = None
    """Tokens that memory holds. None: the checkpoint's."""

    no_memory: bool = False
    """Leave memory out: only the backbone, and the side network without memory."""

    foreign_memory: bool = False
    """Also read the memory of an item of another group, which ought not to help."""

    dense_context: int | None = None
    """Also let the bare backbone read memory and prompt together, the last N tokens of them."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_items", 1),
            ("segment_length", 2),
            ("memory_size", 1),
            ("dense_context", 2),
        ):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
