"""Reading text into a memory: streams of token ids, and documents into a bank on disk."""

from memlayer.ingestion.documents import (
    MemorizedDocument,
    MemorizeProgress,
    MemorizeReport,
    memorize_documents,
)
from memlayer.ingestion.stream import memorize_stream

__all__ = [
    "MemorizeProgress",
    "MemorizeReport",
    "MemorizedDocument",
    "memorize_documents",
    "memorize_stream",
]
