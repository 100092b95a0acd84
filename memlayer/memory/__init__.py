"""What is kept: past keys and values, per row, the oldest dropped first."""

from memlayer.memory.bank import MemoryBank
from memlayer.memory.readers import BankReader, MemoryReader, SelectedRows, StackedReader
from memlayer.memory.retrieved import Retrieved

__all__ = [
    "BankReader",
    "MemoryBank",
    "MemoryReader",
    "Retrieved",
    "SelectedRows",
    "StackedReader",
]
