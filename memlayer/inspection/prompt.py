"""Inspect a text: what each token retrieved, from which passages, and what that changed.

text ─► encode ─┬─► read, memory recorded ─► probabilities with memory, what was retrieved
                └─► read, memory off      ─► probabilities without
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayer.errors import ConfigError, ShapeError
from memlayer.inspection.options import InspectionOptions
from memlayer.inspection.passages import ChunkTotal, PassageMaker
from memlayer.inspection.reading import (
    distance_edges,
    head_readings,
    places_by_token,
    read_layers,
    reads_by_token,
    totals,
)
from memlayer.inspection.recording import record_reads
from memlayer.inspection.results import (
    DocumentReading,
    Inspection,
    MemoryState,
    Prediction,
    TokenReading,
)
from memlayer.inspection.text import decode, pieces
from memlayer.memory import BankReader
from memlayer.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.completion import Completion
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel


def inspect_prompt(
    model: LongMemModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: InspectionOptions | None = None,
) -> Inspection:
    """See what every token of a prompt reads in the model's memory.

    Memory stays as it is.

    Args:
        model: with what it memorized, one row.
        tokenizer: the backbone's.
        prompt: at least a token, and at most a window.
        options: how much is kept; the defaults if None.

    Raises:
        ConfigError: if the prompt is empty, or longer than a window.
        ShapeError: if the memory has several rows.
    """
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long()
    return inspect_tokens(model, tokenizer, ids, options=options)


def inspect_completion(
    model: LongMemModel,
    tokenizer: PreTrainedTokenizerBase,
    completion: Completion,
    options: InspectionOptions | None = None,
) -> Inspection:
    """See what was read to write a text, in its last window if it is longer than one.

    One pass over the text retrieves what its generation retrieved step by step. Of a longer text,
    what generation read back of its own beginning, which no bank holds, is not shown.

    Args:
        model: that wrote it, its memory unchanged.
        tokenizer: the backbone's.
        completion: what it wrote.
        options: how much is kept; the defaults if None.
    """
    window = model.memory_config.segment_length
    outside = max(completion.token_ids.shape[1] - window, 0)
    return inspect_tokens(
        model,
        tokenizer,
        completion.token_ids[:, outside:],
        prompt_tokens=max(completion.prompt_tokens - outside, 1),
        options=options,
    )


@torch.no_grad()
def inspect_tokens(
    model: LongMemModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    *,
    prompt_tokens: int | None = None,
    options: InspectionOptions | None = None,
) -> Inspection:
    """See what every token of a text reads, as `inspect_prompt` does.

    Args:
        model: with what it memorized, one row.
        tokenizer: the backbone's.
        input_ids: ``(1, T)``, int64, at most a window.
        prompt_tokens: where the prompt ends and what was generated begins; passages and documents
            are then those that were read to generate it. None: all is prompt.
        options: how much is kept; the defaults if None.

    Raises:
        ConfigError: if there is no token, or more than fit into a window.
        ShapeError: if the memory has several rows.
    """
    options = InspectionOptions() if options is None else options
    bank = model.memory
    _check(model, bank, input_ids, prompt_tokens)
    ids = input_ids.to(model.device)
    count = ids.shape[1]
    with evaluating(model):
        states = model.encode(ids)
        with record_reads(model) as records:
            on = model.read(states, BankReader(bank))
        off = model.read(states)
    readings = read_layers(model, records)
    read = totals(readings, range(count))
    reads = reads_by_token(readings, read, count, options.chunks_per_token)
    if readings:
        places = places_by_token(readings, count, bank.chunk_numbers(0), options.place_bins)
    else:
        places = [[0.0] * options.place_bins] * count
    predicted = _predictions(tokenizer, ids[0], on[0], off[0], options.predictions)
    maker = PassageMaker(bank, tokenizer, context=options.context)
    summed = range(count)
    if prompt_tokens is not None and prompt_tokens < count:
        # A token is predicted by the one before it, which read for it.
        summed = range(prompt_tokens - 1, count - 1)
        counted = totals(readings, summed)
    else:
        counted = read
    shown = sorted({item.chunk for token in reads for item in token})
    maker.prepare(shown)
    return Inspection(
        backbone=model.backbone.name_or_path or model.config.model_type,
        memory=_memory_state(bank),
        prompt_tokens=count if prompt_tokens is None else prompt_tokens,
        tokens=tuple(
            TokenReading(**prediction, reads=tuple(own), places=tuple(place))
            for prediction, own, place in zip(predicted, reads, places, strict=True)
        ),
        chunks=tuple(maker.chunk(chunk, read[chunk]) for chunk in shown),
        passages=tuple(maker.strongest(counted, tokens=len(summed), most=options.passages)),
        documents=_documents(maker, counted),
        summed=(summed.start, summed.stop),
        heads=head_readings(model, readings, bank),
        distance_edges=distance_edges(bank),
    )


def _check(
    model: LongMemModel, bank: MemoryBank, input_ids: Tensor, prompt_tokens: int | None
) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ShapeError(f"input_ids must have shape (1, T), got {tuple(input_ids.shape)}")
    tokens, window = input_ids.shape[1], model.memory_config.segment_length
    if tokens == 0:
        raise ConfigError("the prompt is empty; give at least one token")
    if tokens > window:
        raise ConfigError(
            f"an inspected text must fit into one window of {window} tokens, got {tokens}; "
            "memorize its beginning and inspect the rest"
        )
    if prompt_tokens is not None and not 1 <= prompt_tokens <= tokens:
        raise ConfigError(
            f"prompt_tokens must be within 1 to the {tokens} tokens given, got {prompt_tokens}"
        )
    if bank.rows > 1:
        raise ShapeError(
            f"an inspected memory must have one row, got {bank.rows}; memorize one text at a time"
        )


def _predictions(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, on: Tensor, off: Tensor, most: int
) -> list[dict[str, Any]]:
    """Give the fields of `TokenReading` that speak of predictions.

    Args:
        tokenizer: of the ids.
        ids: ``(T,)``.
        on: logits ``(T, V)``, memory read.
        off: likewise, memory off.
        most: likeliest next tokens to keep of either.
    """
    log_on, log_off = (torch.log_softmax(logits.float(), dim=-1) for logits in (on, off))
    # (T - 1,): what the tokens before gave to each token but the first
    following = ids[1:].unsqueeze(1)
    own = [log[:-1].gather(1, following).squeeze(1).tolist() for log in (log_on, log_off)]
    fields: list[dict[str, Any]] = [
        {
            "id": token,
            "text": text,
            "with_memory": None,
            "without_memory": None,
            "gain": None,
            "expected": _expected(tokenizer, log_on[number], log_off[number], most),
        }
        for number, (token, text) in enumerate(
            zip(ids.tolist(), pieces(tokenizer, ids.tolist()), strict=True)
        )
    ]
    for field, with_memory, without in zip(fields[1:], *own, strict=True):
        field |= {
            "with_memory": math.exp(with_memory),
            "without_memory": math.exp(without),
            "gain": (with_memory - without) / math.log(2),
        }
    return fields


def _expected(
    tokenizer: PreTrainedTokenizerBase, log_on: Tensor, log_off: Tensor, most: int
) -> tuple[Prediction, ...]:
    likeliest = [log.topk(min(most, len(log))).indices.tolist() for log in (log_on, log_off)]
    chosen = sorted({*likeliest[0], *likeliest[1]}, key=lambda token: -float(log_on[token]))
    return tuple(
        Prediction(
            id=token,
            text=decode(tokenizer, [token]),
            with_memory=math.exp(float(log_on[token])),
            without_memory=math.exp(float(log_off[token])),
        )
        for token in chosen
    )


def _documents(maker: PassageMaker, read: Mapping[int, ChunkTotal]) -> tuple[DocumentReading, ...]:
    chunks: defaultdict[str | None, list[float]] = defaultdict(list)
    for name, total in zip(maker.documents_of(list(read)), read.values(), strict=True):
        chunks[name].append(total.weight)
    found = [
        DocumentReading(document=name, weight=sum(weights), chunks=len(weights))
        for name, weights in chunks.items()
    ]
    return tuple(sorted(found, key=lambda item: -item.weight))


def _memory_state(bank: MemoryBank) -> MemoryState:
    written = bank.tokens_written(0) if bank.rows else 0
    return MemoryState(
        tokens=len(bank),
        capacity=bank.capacity,
        dropped=written - len(bank),
        chunk_size=bank.chunk_size,
        documents=tuple(bank.documents),
    )
