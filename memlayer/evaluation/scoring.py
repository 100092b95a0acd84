"""The loss of every scored token of a document, under every condition.

    window ─► encode, once ─┬─► backbone's logits ───────────────► losses
                            ├─► side network, no memory ─────────► losses
                            ├─► side network, memory of M tokens ► losses, for each M
                            ├─► side network, another's memory ──► losses
                            ├─► votes of the nearest contexts ───► losses of the backbone and of
                            │                                      the largest memory with them
                            └─► keys, values of newly read tokens ─► every memory

What a memory lets be found, when window i is read, are the tokens before the window's first one:
those that overlapping windows share wait in it. A token's keys and values are those of the window
that scored it, in which it has the most context. With fresh segments that is the paper's order:
retrieve, then append the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from memlayer.data.windows import Window, windows
from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlayer.evaluation.knn_lm import NearestTokens
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel

Advance = Callable[[int], None]

FOREIGN = "foreign_memory"
KNN_LM = "knn_lm"
KNN_MEMORY = "knn_memory"

# Rows of float32 logits at a time: 256 x 152k vocabulary are 150 MiB.
_ROWS_AT_ONCE = 256


def backbone_losses(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    *,
    segment_length: int,
    stride: int,
    advance: Advance,
) -> Tensor:
    """Score a document with a bare Hugging Face model.

    Args:
        backbone: causal-LM model.
        input_ids: ``(n,)``, int64, n at least 2.
        segment_length: tokens of a window.
        stride: tokens between the starts of two windows.
        advance: called with the tokens that each window has read.

    Returns:
        ``(n - 1,)``, float32, on the CPU. Losses of tokens 1 to n - 1, nats.
    """
    losses = torch.empty(len(input_ids) - 1)
    for window in windows(len(losses), segment_length, stride):
        inputs = input_ids[window.start : window.end].unsqueeze(0).to(backbone.device)
        kept = window.end - window.score_from
        logits = backbone(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits
        losses[window.score_from : window.end] = _token_losses(logits, input_ids, window)
        advance(window.end - window.start)
    return losses


def model_losses(
    model: LongMemModel,
    input_ids: Tensor,
    *,
    memories: Mapping[str, MemoryBank],
    foreign: Foreign | None = None,
    nearest: NearestTokens | None = None,
    segment_length: int,
    stride: int,
    advance: Advance,
) -> tuple[dict[str, Tensor], int]:
    """Score a document under every condition, with one backbone pass a window.

    Args:
        model: wrapped backbone; its own memory is neither read nor written.
        input_ids: ``(n,)``, int64, n at least 2.
        memories: empty banks by the condition's name, of `overlap` ``segment_length - stride``.
            They hold the document afterwards.
        foreign: another document and an empty bank of that kind: the condition ``foreign_memory``.
        nearest: of no context yet: the conditions ``knn_lm`` and, with a memory, ``knn_memory``.
        segment_length: tokens of a window.
        stride: tokens between the starts of two windows.
        advance: called with the tokens that each window has read.

    Returns:
        Losses ``(n - 1,)``, float32, on the CPU, by condition: ``backbone``, ``no_memory``, the
        names of ``memories``, and ``foreign_memory``, ``knn_lm`` and ``knn_memory`` if they are
        asked for. And the most tokens that a memory held when it was read.

    Raises:
        ConfigError: if a memory has another overlap: it would let the window find itself.
    """
    overlap = segment_length - stride
    for memory in (*memories.values(), *([] if foreign is None else [foreign.memory])):
        if memory.overlap != overlap:
            raise ConfigError(
                f"windows of {segment_length} tokens every {stride} need memories of "
                f"overlap={overlap}, got {memory.overlap}; make them with new_memory(overlap=...)"
            )
    positions = len(input_ids) - 1
    losses = {name: torch.empty(positions) for name in ("backbone", "no_memory", *memories)}
    read = dict(memories)
    if foreign is not None:
        losses[FOREIGN] = torch.empty(positions)
        read[FOREIGN] = foreign.memory
        repeats = -(-positions // len(foreign.input_ids))
        other_ids = foreign.input_ids.repeat(repeats)
    if nearest is not None:
        names = (KNN_LM, KNN_MEMORY) if memories else (KNN_LM,)
        losses |= {name: torch.empty(positions) for name in names}
    held = 0
    for window in windows(positions, segment_length, stride):
        held = max([held, *(len(memory) for memory in memories.values())])
        inputs = input_ids[window.start : window.end].unsqueeze(0).to(model.device)
        states = model.encode(inputs)
        kept = window.end - window.score_from
        scored = slice(window.score_from, window.end)
        logits = model.backbone_logits(states, logits_to_keep=kept)
        losses["backbone"][scored] = _token_losses(logits, input_ids, window)
        if nearest is not None:
            hidden = model.parts.final_norm(states.hidden_states[-1][0, -kept:])
            following = input_ids[window.score_from + 1 : window.end + 1].long()
            nearest.write_before(window.start)
            votes = nearest.votes(hidden, following)
            losses[KNN_LM][scored] = nearest.mixed(losses["backbone"][scored], votes)
            nearest.push(hidden, following)
        logits = model.read(states, None, logits_to_keep=kept)
        losses["no_memory"][scored] = _token_losses(logits, input_ids, window)
        for name, memory in read.items():
            logits = model.read(states, memory, logits_to_keep=kept)
            losses[name][scored] = _token_losses(logits, input_ids, window)
        if nearest is not None and memories:
            largest = losses[list(memories)[-1]][scored]
            losses[KNN_MEMORY][scored] = nearest.mixed(largest, votes)
        keys, values = _last(states.keys, kept), _last(states.values, kept)
        for memory in memories.values():
            memory.write(keys, values)
        if foreign is not None:
            inputs = other_ids[window.start : window.end].unsqueeze(0).to(model.device)
            states = model.encode(inputs)
            foreign.memory.write(_last(states.keys, kept), _last(states.values, kept))
        advance(window.end - window.start)
    return losses, held


@dataclass(frozen=True)
class Foreign:
    """Another document's past, which ought not to help.

    Attributes:
        input_ids: ``(n,)``, int64; read again from the start where it is too short.
        memory: an empty bank for it.
    """

    input_ids: Tensor
    memory: MemoryBank


def _last(parts: Sequence[Tensor], count: int) -> list[Tensor]:
    return [part[:, :, part.shape[2] - count :] for part in parts]


def _token_losses(logits: Tensor, input_ids: Tensor, window: Window) -> Tensor:
    """Give the losses of a window's scored tokens from logits ``(1, scored, V)``, in float32."""
    targets = input_ids[window.score_from + 1 : window.end + 1].to(logits.device)
    parts = [
        functional.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(
            torch.split(logits[0], _ROWS_AT_ONCE), torch.split(targets, _ROWS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(parts).cpu()
