"""What memory does for the loss on validation documents, at one moment of a training run.

Three models read the same tokens from the same backbone pass: the backbone alone, the side network
with its memory off, and with it on. The memory is a bank of its own, so that what the training
streams remember stays as it is. `memlayer.evaluation` measures a finished checkpoint thoroughly, in
the same way; this is the small, fixed sample that draws the curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer.errors import ConfigError, DataError
from memlayer.evaluation.scoring import model_losses
from memlayer.modes import evaluating

if TYPE_CHECKING:
    from memlayer.data import TokenDocument
    from memlayer.model import LongMemModel
    from memlayer.training.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Perplexities:
    """Perplexities over the same tokens: exp of the mean cross entropy."""

    memory_on: float
    """Of the side network with memory: up to ``memory_size`` earlier tokens of the document."""

    memory_off: float
    """Of the side network that reads the segment alone."""

    backbone: float
    """Of the backbone that reads the segment alone."""

    tokens: int
    """Tokens scored."""


def validation_sample(
    documents: Sequence[TokenDocument], *, tokens: int, count: int
) -> list[Tensor]:
    """Choose the tokens to evaluate on: the beginnings of the longest documents.

    Args:
        documents: to choose from.
        tokens: tokens to score in all, shared out evenly. Documents that are shorter than their
            share bring what they have.
        count: documents to choose.

    Returns:
        Token ids ``(n,)``, int64, one tensor a document; its first token is read but not scored.
    """
    longest = sorted(documents, key=lambda document: len(document.input_ids), reverse=True)
    chosen = [document.input_ids for document in longest[:count] if len(document.input_ids) > 1]
    share = math.ceil(tokens / max(len(chosen), 1))
    return [input_ids[: share + 1].long() for input_ids in chosen]


def measure_perplexities(
    model: LongMemModel,
    sample: Sequence[Tensor],
    *,
    stride: int | None = None,
    after_segment: Callable[[], None] = lambda: None,
) -> Perplexities:
    """Score a sample in segments, one after the other, each remembered after it was scored.

    The model's own memory and its training mode are as before afterwards.

    Args:
        model: wrapped backbone.
        sample: what `validation_sample` chose.
        stride: tokens between the starts of two segments; their length if None.
        after_segment: called after each segment; may raise to stop.
    """
    length = model.memory_config.segment_length
    stride = length if stride is None else stride
    names = ("memory", "no_memory", "backbone")
    sums = dict.fromkeys(names, 0.0)
    with torch.no_grad(), evaluating(model):
        for input_ids in sample:
            losses, _ = model_losses(
                model,
                input_ids,
                memories={"memory": model.new_memory(overlap=length - stride)},
                segment_length=length,
                stride=stride,
                advance=lambda tokens: after_segment(),
            )
            for name in names:
                sums[name] += float(losses[name].double().sum())
    tokens = sum(len(input_ids) - 1 for input_ids in sample)
    memory_on, memory_off, backbone = (_exp(sums[name] / max(tokens, 1)) for name in names)
    return Perplexities(
        memory_on=memory_on, memory_off=memory_off, backbone=backbone, tokens=tokens
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def check_sample(sample: Sequence[Tensor], segment_length: int, options: TrainingOptions) -> None:
    """Refuse validation text in which memory on and memory off are the same by construction.

    Args:
        sample: what `validation_sample` gave.
        segment_length: tokens of a segment.
        options: the run's.

    Raises:
        ConfigError: if more of the documents would do.
        DataError: if they are too short.
    """
    longest = max((len(input_ids) - 1 for input_ids in sample), default=0)
    if longest > segment_length:
        return
    if sample and math.ceil(options.eval_tokens / len(sample)) <= segment_length:
        raise ConfigError(
            f"eval_tokens must be more than segment_length={segment_length} for each of "
            f"{len(sample)} validation documents, or their memory is never read, got "
            f"{options.eval_tokens}; give {4 * segment_length * len(sample)} or so"
        )
    raise DataError(
        f"every validation document fits in one segment of segment_length={segment_length} tokens "
        f"(longest: {longest + 1}), so that memory is never read; give longer documents, or none"
    )
