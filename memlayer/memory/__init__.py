"""What is kept: past keys and values, per row, the oldest dropped first."""

from memlayer.memory.bank import MemoryBank, Retrieved

__all__ = ["MemoryBank", "Retrieved"]
