"""Note what every memory layer retrieves, while a forward reads memory as always."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memlayer.attention import recency_bias
from memlayer.memory.retrieved import read_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory import Retrieved
    from memlayer.model import LongMemModel

_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What one memory layer's queries found, and what was made of it."""

    queries: Tensor
    """``(B, H, T, D)``, not scaled, as they met the retrieved keys."""

    retrieved: Retrieved

    share: Tensor
    """``(B, H, T)``, float32 or wider: memory's weight in the head's output, 0 to 1."""


@contextmanager
def record_reads(model: LongMemModel) -> Iterator[dict[int, LayerRecord]]:
    """Note the last reading of every memory layer while this is entered; nothing else changes.

    Yields:
        The records by memory layer, counted from 0: empty until a forward has read, and wherever
        nothing was readable.
    """
    records: dict[int, LayerRecord] = {}

    def note(layer: int, queries: Tensor, retrieved: Retrieved, share: Tensor) -> None:
        records[layer] = LayerRecord(
            queries=queries.detach(), retrieved=retrieved, share=share.detach()
        )

    reading = model.side_network.reading
    before, reading.observer = reading.observer, note
    try:
        yield records
    finally:
        reading.observer = before


@dataclass(frozen=True, kw_only=True)
class ChunkShares:
    """How a head's memory attention divides among the chunks that it retrieved.

    Both are ``(B, H, T, n)``, float32, 0 where nothing was found, and sum to 1 over ``n`` where
    anything was.
    """

    attention: Tensor
    """By the softmax alone: its weights, summed over the tokens of each chunk."""

    contribution: Tensor
    """By what the chunks added to the head's output: the norm of each one's weighted values."""


@torch.no_grad()
def chunk_shares(model: LongMemModel, record: LayerRecord, layer: int) -> ChunkShares:
    r"""Give each retrieved chunk's share of its head's memory attention.

    .. math:: \mathrm{attention}_c = \sum_{i \in c} w_i, \qquad
        \mathrm{contribution}_c = \frac{\lVert \sum_{i \in c} w_i v_i \rVert}
        {\sum_{c'} \lVert \sum_{i \in c'} w_i v_i \rVert}

    The two differ most at the start of a segment: its first token draws attention whatever it says
    (an attention sink), but its values are small, so that it adds little.

    Args:
        model: the model that read.
        record: of memory layer ``layer``.
        layer: counted from 0.

    Source:
        Kobayashi et al., "Attention is Not Only a Weight" (arXiv:2004.10102), for the norm.
    """
    network, retrieved = model.side_network, record.retrieved
    scaling = network.scaling(layer)
    bias = torch.zeros(retrieved.places.shape, device=record.queries.device)
    if network.slopes is not None:
        bias = recency_bias(network.slopes[layer], retrieved)
    bias = bias.flatten(0, 2)
    queries = record.queries.flatten(0, 2).float()  # (N, D), N = B * H * T
    places, found = retrieved.places.flatten(0, 2), retrieved.found.flatten(0, 2)
    attention = torch.zeros(places.shape, device=queries.device)
    added = torch.zeros_like(attention)
    chunk_size, head_dim = retrieved.chunk_shape
    block = max(1, _BLOCK_BYTES // (places.shape[1] * chunk_size * head_dim * 4))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        # (N, n, C, D) . (N, D) -> (N, n, C)
        keys = read_chunks(retrieved.keys, places[part]).float()
        scores = torch.einsum("qncd,qd->qnc", keys, queries[part]) * scaling
        scores += bias[part].unsqueeze(-1)
        scores = scores.masked_fill(~found[part].unsqueeze(-1), -torch.inf)
        weights = torch.softmax(scores.flatten(1), dim=1).nan_to_num(nan=0.0).view(scores.shape)
        attention[part] = weights.sum(dim=-1)
        values = read_chunks(retrieved.values, places[part]).float()
        added[part] = torch.einsum("qnc,qncd->qnd", weights, values).norm(dim=-1)
    total = added.sum(dim=1, keepdim=True).clamp(min=torch.finfo(added.dtype).tiny)
    shape = retrieved.places.shape
    return ChunkShares(attention=attention.view(shape), contribution=(added / total).view(shape))
