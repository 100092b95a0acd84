"""What is kept: past keys and values, per row, the oldest dropped first."""

from memlayer.memory.bank import MemoryBank
from memlayer.memory.retrieved import Retrieved

__all__ = ["MemoryBank", "Retrieved"]
