"""Documents into a bank, from names: of sources, of a model. What ``memlayer memorize`` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memlayer.data import load_documents
from memlayer.ingestion.documents import MemorizeProgress, MemorizeReport, memorize_documents
from memlayer.loading import ModelNames, load_model
from memlayer.memory import bank_exists

if TYPE_CHECKING:
    from memlayer.plugins import Plugins


def memorize_from_names(
    sources: Sequence[str],
    bank: str | Path,
    names: ModelNames,
    *,
    save_every: int = 16,
    progress: Callable[[MemorizeProgress], None] | None = None,
    plugins: Plugins | None = None,
) -> MemorizeReport:
    """Load documents and a model, memorize. Documents come first: they are quick to get wrong.

    Args:
        sources: what `memlayer.data.load_documents` takes; all of their documents are meant.
        bank: a directory. If there is a bank in it, the model gets that bank's size and layers.
        names: which model.
        save_every: as for `memorize_documents`.
        progress: likewise.
        plugins: where backends and adapters come from; what is installed if None.

    Raises:
        MemlayerError: of the kind that fits; see `load_documents`, `load_model` and
            `memorize_documents`.
    """
    documents = load_documents(sources, split="all")
    settings_of = bank if bank_exists(bank) else None
    loaded = load_model(names, bank=settings_of, remember=False, plugins=plugins)
    return memorize_documents(
        loaded.model,
        loaded.tokenizer,
        documents,
        bank,
        save_every=save_every,
        progress=progress,
    )
