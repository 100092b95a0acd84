"""Note what every memory layer retrieves, while a forward reads memory as always."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from memlayer.memory.retrieved import read_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from memlayer.memory import MemoryReader, Retrieved
    from memlayer.model import LongMemModel

_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One memory layer's queries, and what they found."""

    queries: Tensor
    """``(B, H, T, D)``, not rotated, not scaled."""

    retrieved: Retrieved


class RecordingReader:
    """A memory that answers as another one does, and keeps every answer.

    Args:
        reader: the memory that is read.

    Attributes:
        records: by memory layer, counted from 0: the last answer. Empty if nothing was readable.
    """

    def __init__(self, reader: MemoryReader) -> None:
        self._reader = reader
        self.records: dict[int, LayerRecord] = {}

    @property
    def is_readable(self) -> bool:
        """Whether the other memory is."""
        return self._reader.is_readable

    def retrieve(self, queries: Tensor, *, layer: int) -> Retrieved:
        """Find the chunks for the queries ``(B, H, T, D)``, and note both."""
        retrieved = self._reader.retrieve(queries, layer=layer)
        self.records[layer] = LayerRecord(queries=queries.detach(), retrieved=retrieved)
        return retrieved


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
    # Queries (N, D), N = B * H * T, as the layer's memory attention sees them.
    queries = network.rotate(record.queries).flatten(0, 2).float()
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
        scores = scores.masked_fill(~found[part].unsqueeze(-1), -torch.inf)
        weights = torch.softmax(scores.flatten(1), dim=1).nan_to_num(nan=0.0).view(scores.shape)
        attention[part] = weights.sum(dim=-1)
        values = read_chunks(retrieved.values, places[part]).float()
        added[part] = torch.einsum("qnc,qncd->qnd", weights, values).norm(dim=-1)
    total = added.sum(dim=1, keepdim=True).clamp(min=torch.finfo(added.dtype).tiny)
    shape = retrieved.places.shape
    return ChunkShares(attention=attention.view(shape), contribution=(added / total).view(shape))
