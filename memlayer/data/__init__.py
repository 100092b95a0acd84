"""Documents and the batches made of them.

sources ──► load_documents ──► tokenize_documents ──► StreamBatches ──► Batch
   │        (one split)        (TokenDocument)        (rows are streams)
   └──────► prepare_corpus ──► TokenCorpus.select ────────┘
            (ids on disk)      (one split, mapped)
"""

from memlayer.data.corpus import TokenCorpus, prepare_corpus
from memlayer.data.documents import Document, Split
from memlayer.data.sources import check_sources, iterate_documents, load_documents
from memlayer.data.streams import IGNORED, Batch, StreamBatches
from memlayer.data.tokens import (
    TokenDocument,
    count_tokens,
    tokenize_documents,
    tokenizer_fingerprint,
)

__all__ = [
    "IGNORED",
    "Batch",
    "Document",
    "Split",
    "StreamBatches",
    "TokenCorpus",
    "TokenDocument",
    "check_sources",
    "count_tokens",
    "iterate_documents",
    "load_documents",
    "prepare_corpus",
    "tokenize_documents",
    "tokenizer_fingerprint",
]
