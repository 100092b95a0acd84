"""What is kept: past keys and values, per row, the oldest dropped first."""

from memlayer.memory.bank import MemoryBank
from memlayer.memory.documents import DocumentRecord
from memlayer.memory.lock import bank_lock
from memlayer.memory.readers import BankReader, MemoryReader, SelectedRows, StackedReader
from memlayer.memory.retrieved import Retrieved
from memlayer.memory.store import BankInfo, BankReport, bank_exists, bank_info, verify_bank

__all__ = [
    "BankInfo",
    "BankReader",
    "BankReport",
    "DocumentRecord",
    "MemoryBank",
    "MemoryReader",
    "Retrieved",
    "SelectedRows",
    "StackedReader",
    "bank_exists",
    "bank_info",
    "bank_lock",
    "verify_bank",
]
