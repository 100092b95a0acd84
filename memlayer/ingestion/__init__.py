"""Reading text into a memory: streams of token ids, and documents into a bank on disk."""

from memlayer.ingestion.stream import memorize_stream

__all__ = ["memorize_stream"]
