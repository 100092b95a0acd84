"""Evaluation from names: of a model and of corpora. What ``memlayer eval`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import memlayer
from memlayer.backbones import Backbone, load_backbone
from memlayer.checkpoint import find_checkpoint, load, read_config
from memlayer.data import load_documents, tokenize_documents
from memlayer.devices import choose_device
from memlayer.errors import ConfigError
from memlayer.evaluation.documents import first_tokens
from memlayer.evaluation.perplexity import evaluate_perplexity

if TYPE_CHECKING:
    from memlayer.data.documents import Split
    from memlayer.evaluation.options import PerplexityOptions, Progress
    from memlayer.evaluation.results import PerplexityResult
    from memlayer.model import LongMemModel


def evaluate_perplexity_from_names(
    data: Sequence[str],
    options: PerplexityOptions,
    *,
    checkpoint: str | None = None,
    backbone: str | None = None,
    split: Split = "validation",
    max_documents: int | None = None,
    max_tokens: int | None = None,
    backend: str | None = None,
    dtype: str = "fp32",
    device: str = "auto",
    progress: Progress | None = None,
) -> PerplexityResult:
    """Load documents and a model, evaluate. Documents come first: they are quick to get wrong.

    Args:
        data: what `memlayer.data.load_documents` takes.
        options: what to measure.
        checkpoint: what `memlayer.load` takes. Either this or ``backbone``.
        backbone: what `memlayer.load_backbone` takes, to be evaluated alone.
        split: of the documents.
        max_documents: the first ones are evaluated; None: all.
        max_tokens: the beginning of each document that is evaluated; None: the whole.
        backend: a retrieval backend instead of the checkpoint's.
        dtype: of the backbone.
        device: ``"auto"`` is ``"cuda"`` where there is one, else ``"cpu"``.
        progress: as for `evaluate_perplexity`.

    Raises:
        ConfigError: if not exactly one of checkpoint and backbone is given, or an option does not
            fit.
        MemlayerError: of the kind that fits whatever else is wrong with names, files or data.
    """
    _check_names(checkpoint, backbone, backend)
    for name, value, least in (("max_documents", max_documents, 1), ("max_tokens", max_tokens, 2)):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    place = {"dtype": dtype, "device": choose_device(device)}
    documents = load_documents(data, split=split)[:max_documents]
    model, loaded = load_subject(checkpoint, backbone, backend, place)
    tokenized = tokenize_documents(documents, loaded.tokenizer)
    if max_tokens is not None:
        tokenized = first_tokens(tokenized, max_tokens, loaded.tokenizer)
    result = evaluate_perplexity(model, tokenized, options, progress=progress)
    source = {
        "memlayer_version": memlayer.__version__,
        "checkpoint": checkpoint,
        "backbone": loaded.name,
        "data": list(data),
        "split": split,
        "max_documents": max_documents,
        "max_tokens": max_tokens,
        **place,
    }
    return replace(result, settings=source | dict(result.settings))


def load_subject(
    checkpoint: str | None, backbone: str | None, backend: str | None, place: dict[str, str]
) -> tuple[Any, Backbone]:
    """Load what is to be evaluated: a checkpoint with its backbone, or a backbone alone.

    Args:
        checkpoint: what `memlayer.load` takes. Either this or ``backbone``.
        backbone: what `memlayer.load_backbone` takes.
        backend: a retrieval backend instead of the checkpoint's.
        place: the backbone's ``dtype`` and ``device``.

    Returns:
        The model, and the backbone as it was loaded.

    Raises:
        ConfigError: if not exactly one of checkpoint and backbone is given, or a backbone alone has
            a backend.
    """
    _check_names(checkpoint, backbone, backend)
    if checkpoint is None:
        assert backbone is not None
        loaded = load_backbone(backbone, **place)
        return loaded.model, loaded
    return load_checkpoint(checkpoint, backend, place)


def _check_names(checkpoint: str | None, backbone: str | None, backend: str | None) -> None:
    if (checkpoint is None) == (backbone is None):
        raise ConfigError(
            f"give either a checkpoint or a backbone, got checkpoint={checkpoint!r} and "
            f"backbone={backbone!r}"
        )
    if checkpoint is None and backend is not None:
        raise ConfigError(f"backend {backend!r} has no memory to search without a checkpoint")


def load_checkpoint(
    checkpoint: str, backend: str | None, place: dict[str, str]
) -> tuple[LongMemModel, Backbone]:
    """Load a checkpoint on the backbone that its configuration names, and that backbone."""
    name = read_config(find_checkpoint(checkpoint))["base_model_name_or_path"]
    loaded = load_backbone(str(name), **place)
    return load(checkpoint, loaded.model, backend), loaded
