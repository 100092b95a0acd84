"""One pass's reading of memory, in numbers: what each head and each token took from which chunk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memlayer.inspection.passages import ChunkTotal
from memlayer.inspection.recording import LayerRecord, chunk_shares
from memlayer.inspection.results import HeadRead, HeadReading, Read

if TYPE_CHECKING:
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel

_FIRST_EDGE = 64


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """One memory layer's reading, on the CPU; a chunk that was not found has weight 0."""

    layer: int
    """As the backbone counts its layers."""

    ids: Tensor
    """``(H, T, n)``, int64; -1 where no chunk was found."""

    scores: Tensor
    """``(H, T, n)``, float32, of the search."""

    attention: Tensor
    """``(H, T, n)``, float32; see `ChunkShares`."""

    contribution: Tensor
    """``(H, T, n)``, float32; see `ChunkShares`."""

    share: Tensor
    """``(H, T)``, float32. Memory's weight in the head's output, 0 to 1."""

    weights: Tensor
    """``(H, T, n)``, float32. Shares of the token's reading, in all memory layers together."""


def read_layers(model: LongMemModel, records: dict[int, LayerRecord]) -> list[LayerReading]:
    """Turn what `record_reads` noted for one row into numbers.

    Returns:
        One reading a memory layer; none if there was nothing to read.
    """
    layers = model.memory_config.memory_layers or ()
    shares = {number: record.share[0].float().cpu() for number, record in records.items()}
    # (T,): what the token's heads give to memory, all together.
    total = sum((share.sum(dim=0) for share in shares.values()), torch.tensor(0.0))
    total = total.clamp(min=torch.finfo(torch.float32).tiny)
    readings = []
    for number, record in records.items():
        of_chunks = chunk_shares(model, record, number)
        contribution = of_chunks.contribution[0].cpu()
        readings.append(
            LayerReading(
                layer=layers[number],
                ids=record.retrieved.ids[0].cpu(),
                scores=record.retrieved.scores[0].float().cpu(),
                attention=of_chunks.attention[0].cpu(),
                contribution=contribution,
                share=shares[number],
                weights=contribution * (shares[number] / total).unsqueeze(-1),
            )
        )
    return readings


def reads_by_token(
    readings: Sequence[LayerReading], read: Mapping[int, ChunkTotal], tokens: int, most: int
) -> list[list[Read]]:
    """Give what each token read, at most ``most`` chunks, by weight x rarity.

    Args:
        readings: of all memory layers.
        read: `totals` of all tokens.
        tokens: how many there are.
        most: chunks to keep of each.
    """
    weights: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(tokens)]
    heads: list[defaultdict[int, list[HeadRead]]] = [defaultdict(list) for _ in range(tokens)]
    for reading in readings:
        for head, token, chunk, score, attention, contribution, weight in _each(reading):
            weights[token][chunk] += weight
            heads[token][chunk].append(
                HeadRead(
                    layer=reading.layer,
                    head=head,
                    score=score,
                    attention=attention,
                    contribution=contribution,
                )
            )
    found = []
    for by_chunk, by_head in zip(weights, heads, strict=True):
        salience = {
            chunk: replace(read[chunk], weight=weight).salience(tokens)
            for chunk, weight in by_chunk.items()
        }
        found.append(
            [
                Read(
                    chunk=chunk,
                    weight=by_chunk[chunk],
                    heads=tuple(sorted(by_head[chunk], key=lambda item: -item.contribution)),
                )
                for chunk in sorted(salience, key=lambda chunk: (-salience[chunk], chunk))[:most]
            ]
        )
    return found


def totals(readings: Sequence[LayerReading], tokens: Sequence[int]) -> dict[int, ChunkTotal]:
    """Add up what some tokens read of every chunk that any of them retrieved."""
    chosen = set(tokens)
    weights: defaultdict[int, float] = defaultdict(float)
    readers: defaultdict[int, set[int]] = defaultdict(set)
    for reading in readings:
        for _, token, chunk, *_, weight in _each(reading):
            if token in chosen:
                weights[chunk] += weight / len(chosen)
                readers[chunk].add(token)
    return {
        chunk: ChunkTotal(weight=weights[chunk], readers=frozenset(readers[chunk]))
        for chunk in weights
    }


def places_by_token(
    readings: Sequence[LayerReading], tokens: int, held: range, bins: int
) -> list[list[float]]:
    """Add up each token's weights by place: ``bins`` equal parts of the chunks that are held."""
    places = torch.zeros(tokens, bins)
    for reading in readings:
        place = (reading.ids - held.start).clamp(min=0) * bins // len(held)
        for head, weights in zip(place, reading.weights, strict=True):
            places.scatter_add_(1, head, weights)
    found: list[list[float]] = places.tolist()
    return found


def head_readings(
    model: LongMemModel, readings: Sequence[LayerReading], bank: MemoryBank
) -> tuple[HeadReading, ...]:
    """Give what every head takes from memory, and how far back it reads."""
    edges = torch.tensor(distance_edges(bank))
    layers = model.memory_config.memory_layers or ()
    by_layer = {reading.layer: reading for reading in readings}
    found: list[HeadReading] = []
    for layer, gates in zip(layers, model.side_network.gates, strict=True):
        shares = torch.zeros(len(gates), len(edges) - 1)
        taken = torch.sigmoid(gates.float()).cpu()
        if layer in by_layer:
            reading = by_layer[layer]
            taken = reading.share.mean(dim=1)
            distance = bank.tokens_written(0) - (reading.ids + 1) * bank.chunk_size
            place = torch.bucketize(distance, edges[1:-1], right=True)
            shares.scatter_add_(1, place.flatten(1), reading.contribution.flatten(1))
            shares /= shares.sum(dim=1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        found.extend(
            HeadReading(layer=layer, head=head, gate=gate, by_distance=tuple(share))
            for head, (gate, share) in enumerate(zip(taken.tolist(), shares.tolist(), strict=True))
        )
    return tuple(found)


def distance_edges(bank: MemoryBank) -> tuple[int, ...]:
    """Cut distances into classes that double, as far as memory reaches: 0, 64, 128, ..."""
    edges = [0, _FIRST_EDGE]
    while edges[-1] < len(bank):
        edges.append(2 * edges[-1])
    return tuple(edges)


def _each(
    reading: LayerReading,
) -> Iterator[tuple[int, int, int, float, float, float, float]]:
    """Go through what was found: head, token, chunk, score, attention, contribution, weight."""
    head, token, place = torch.nonzero(reading.ids >= 0, as_tuple=True)
    found = head, token, place
    columns = (reading.ids, reading.scores, reading.attention, reading.contribution)
    yield from zip(
        head.tolist(),
        token.tolist(),
        *(column[found].tolist() for column in (*columns, reading.weights)),
        strict=True,
    )
