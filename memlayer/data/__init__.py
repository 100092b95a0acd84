"""Documents and the batches made of them.

sources ──► load_documents ──► tokenize_documents ──► StreamBatches ──► Batch
            (one split)        (TokenDocument)        (rows are streams)
"""

from memlayer.data.documents import Document, Split
from memlayer.data.sources import load_documents
from memlayer.data.streams import IGNORED, Batch, StreamBatches
from memlayer.data.tokens import TokenDocument, count_tokens, tokenize_documents

__all__ = [
    "IGNORED",
    "Batch",
    "Document",
    "Split",
    "StreamBatches",
    "TokenDocument",
    "count_tokens",
    "load_documents",
    "tokenize_documents",
]
