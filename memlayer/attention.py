"""Attention over what was retrieved, and its fusion with attention over the local window.

The gathered keys and values of one token are K times its size, so they exist only for a block of
tokens at a time: forward and backward walk over blocks and read the bank where it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlayer.errors import ShapeError
from memlayer.memory.retrieved import read_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memlayer.memory import Retrieved

_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**26}
"""Gathered keys or values at a time: about a core's cache, and enough to keep a GPU busy."""

_NEWEST_TOKENS = 64
"""Where `recency_bias` begins to fall."""


def memory_attention(
    query: Tensor, retrieved: Retrieved, scaling: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Attend over each query's own retrieved tokens.

    .. math:: M_t = \sum_i \mathrm{softmax}_i(s\, q_t \cdot \tilde k_{t,i} + b_{t,i})\,
        \tilde v_{t,i}, \qquad
        Z_t = \log \sum_i \exp(s\, q_t \cdot \tilde k_{t,i} + b_{t,i})

    Tokens that were not found have no weight; where nothing was found :math:`M` is 0 and :math:`Z`
    is ``-inf``. Gradients flow to queries and bias: keys and values are the frozen backbone's.

    Args:
        query: ``(B, H, T, D)``, any float dtype, not scaled.
        retrieved: what `MemoryBank.retrieve` gave for these queries' positions; K tokens each.
        scaling: :math:`s`, usually ``D ** -0.5``.
        bias: ``(B, H, T, n)``, float32 or wider. :math:`b`, one number for all tokens of a chunk,
            as `recency_bias` gives it; None: 0.

    Returns:
        :math:`M`, ``(B, H, T, D)`` in the dtype of ``query``, computed in float32 or wider, and
        :math:`Z`, ``(B, H, T)`` in float32 or wider.

    Raises:
        ShapeError: if ``query`` and ``retrieved`` are not of the same shape; on backward, if the
            memory was written twice since, so that what was read is gone.

    Source:
        LongMem (arXiv:2306.07174), token-to-chunk retrieval and memory fusion.
    """
    if query.shape[:3] != retrieved.places.shape[:3]:
        raise ShapeError(
            f"query and retrieved must agree in (B, H, T), got {tuple(query.shape[:3])} and "
            f"{tuple(retrieved.places.shape[:3])}"
        )
    with torch.autocast(query.device.type, enabled=False):
        attended, log_mass = _MemoryAttention.apply(  # type: ignore[no-untyped-call]
            query.flatten(0, 2), retrieved, scaling, None if bias is None else bias.flatten(0, 2)
        )
    return attended.view(query.shape), log_mass.view(query.shape[:3])


class _MemoryAttention(torch.autograd.Function):
    """Blocked over queries; the backward pass gathers again instead of keeping what it read."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, retrieved: Retrieved, scaling: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # query (N, D) with N = B * H * T; bias (N, n); weights (N, K); log_mass (N,)
        found = retrieved.found.flatten(0, 2)
        chunk_size, _ = retrieved.chunk_shape
        precision = torch.promote_types(query.dtype, torch.float32)
        weights = query.new_empty((found.shape[0], found.shape[1] * chunk_size), dtype=precision)
        output = torch.empty_like(query)
        log_mass = query.new_empty(found.shape[0], dtype=precision)
        gather = _Gathering(retrieved, precision)
        for block in gather.blocks():
            scores = _dot(gather.keys(block), query[block].to(precision)) * scaling
            if bias is not None:
                scores += bias[block].repeat_interleave(chunk_size, dim=1)
            missing = ~found[block].repeat_interleave(chunk_size, dim=1)
            scores = scores.masked_fill_(missing, -torch.inf)
            log_mass[block] = torch.logsumexp(scores, dim=1)
            # A softmax over nothing is NaN: those queries get weight 0 everywhere.
            weights[block] = torch.softmax(scores, dim=1).nan_to_num_(nan=0.0)
            output[block] = _mix(weights[block], gather.values(block)).to(query.dtype)
        ctx.save_for_backward(weights)
        ctx.retrieved, ctx.scaling = retrieved, scaling
        ctx.biased = None if bias is None else bias.dtype
        return output, log_mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor, grad_log_mass: Tensor
    ) -> tuple[Tensor, None, None, Tensor | None]:
        (weights,) = ctx.saved_tensors
        retrieved: Retrieved = ctx.retrieved
        if not retrieved.intact():
            raise ShapeError(
                "the memory was written too often between forward and backward: what was read is "
                "overwritten; call backward before the second update"
            )
        grad_query = torch.empty_like(grad_output)
        chunks = retrieved.places.flatten(0, 2).shape
        grad_bias = None if ctx.biased is None else grad_output.new_empty(chunks, dtype=ctx.biased)
        gather = _Gathering(retrieved, weights.dtype)
        for block in gather.blocks():
            grad_weights = _dot(gather.values(block), grad_output[block].to(weights.dtype))
            mean = (weights[block] * grad_weights).sum(dim=1, keepdim=True)
            grad_scores = grad_weights - mean + grad_log_mass[block].unsqueeze(1)
            grad_scores = weights[block] * grad_scores
            if grad_bias is not None:
                grad_bias[block] = grad_scores.unflatten(1, (chunks[1], -1)).sum(dim=2)
            grad_queries = _mix(grad_scores * ctx.scaling, gather.keys(block))
            grad_query[block] = grad_queries.to(grad_query.dtype)
        return grad_query, None, None, grad_bias


class _Gathering:
    """Keys and values of one block of queries after the other, in memory that is used again."""

    def __init__(self, retrieved: Retrieved, dtype: torch.dtype) -> None:
        chunk_size, head_dim = retrieved.chunk_shape
        self._retrieved, self._dtype = retrieved, dtype
        self._places = retrieved.places.flatten(0, 2)
        numbers = self._places.shape[1] * chunk_size * head_dim
        store = retrieved.keys[0]
        block_bytes = _BLOCK_BYTES.get(store.device.type, _BLOCK_BYTES["cuda"])
        self._size = max(1, block_bytes // (4 * numbers))
        self._memory = store.new_empty(min(self._size, len(self._places)) * numbers)

    def blocks(self) -> Iterator[slice]:
        """Cut the N queries so that gathered keys or values take at most `_BLOCK_BYTES`."""
        for start in range(0, len(self._places), self._size):
            yield slice(start, start + self._size)

    def keys(self, block: slice) -> Tensor:
        """Give ``(N, K, D)``, until keys or values are asked for again."""
        return self._read(self._retrieved.keys, block)

    def values(self, block: slice) -> Tensor:
        """Give ``(N, K, D)``, until keys or values are asked for again."""
        return self._read(self._retrieved.values, block)

    def _read(self, stores: Sequence[Tensor], block: slice) -> Tensor:
        chunks = read_chunks(stores, self._places[block], self._memory)  # (N, n, C, D)
        return chunks.flatten(1, 2).to(self._dtype)


def _dot(vectors: Tensor, query: Tensor) -> Tensor:
    """Inner products ``(N, K, D) . (N, D) -> (N, K)``."""
    # A row times a matrix: several times as fast on a CPU as a matrix times a column.
    return torch.bmm(query.unsqueeze(1), vectors.transpose(1, 2)).squeeze(1)


def _mix(weights: Tensor, vectors: Tensor) -> Tensor:
    """Weighted sums ``(N, K), (N, K, D) -> (N, D)``."""
    return torch.bmm(weights.unsqueeze(1), vectors).squeeze(1)


def recency_bias(slope: Tensor, retrieved: Retrieved) -> Tensor:
    r"""Say how much less what was written long ago counts.

    .. math:: b_{h,t,i} = -r_h \log_{10}\bigl(1 + a_{t,i} / 64\bigr)

    with :math:`a` the tokens written since the chunk was. A query's own place in the window is no
    part of it, so that the bias is the same in one forward as in cached steps.

    Args:
        slope: ``(H,)``, float32. :math:`r`: what is ten times as old counts :math:`e^{r}` times
            less.
        retrieved: what is biased.

    Returns:
        ``(B, H, T, n)``, in the dtype of ``slope``.

    Source:
        The logarithmic form of KERPLE (arXiv:2205.09921), on the age of memories.
    """
    chunk_size, _ = retrieved.chunk_shape
    ages = (retrieved.ages * chunk_size).to(slope.dtype)
    return -slope.view(1, -1, 1, 1) * torch.log10(1 + ages / _NEWEST_TOKENS)


def memory_share(gate: Tensor, found: Tensor, advantage: Tensor | None = None) -> Tensor:
    r"""Give the weight of memory in each head's output, from 0 to 1.

    .. math:: w_{h,t} = \sigma(g_h) \quad\text{or}\quad
        w_{h,t} = \sigma(g_h + Z^M_{h,t} - Z^A_{h,t})

    The second form is that of one softmax over local and retrieved tokens together, with
    :math:`g_h` added to the scores of the retrieved ones. A query token that found no memory
    gives it no weight, whatever the gate.

    Args:
        gate: ``(H,)``, float32. :math:`g`; 0 weighs both sides equally, or adds nothing.
        found: ``(B, H, T)``, bool. Whether any retrieved token was valid.
        advantage: ``(B, H, T)``, float32 or wider. :math:`Z^M - Z^A`, logarithms of what both
            softmaxes were divided by; None for the first form.

    Returns:
        ``(B, H, T)``, float32 or wider.

    Source:
        LongMem (arXiv:2306.07174), memory fusion. The sign of ``g`` is the one in the authors'
        code (``memory_bias``): a large ``g`` means *more memory*; the paper's formula negates it.
        One softmax over both: Focused Transformer (arXiv:2307.03170).
    """
    # Sigmoid in float32: in bfloat16 it is exactly 1, with gradient 0, from g = 6.25 up.
    precision = torch.promote_types(gate.dtype, torch.float32)
    weighed = gate.to(precision).view(1, -1, 1)
    if advantage is not None:
        # Where nothing was found it is -inf, or NaN if a padding token sees nothing at all either.
        weighed = weighed + advantage.masked_fill(~found, 0.0)
    return torch.sigmoid(weighed) * found


def fuse(local: Tensor, memory: Tensor, share: Tensor) -> Tensor:
    r"""Mix local and memory attention outputs.

    .. math:: H_{h,t} = (1 - w_{h,t})\, A_{h,t} + w_{h,t}\, M_{h,t}

    Args:
        local: ``(B, H, T, D)``, any float dtype. :math:`A`, attention over the current window.
        memory: ``(B, H, T, D)``, same dtype. :math:`M`, attention over retrieved tokens.
        share: ``(B, H, T)``. :math:`w`, as `memory_share` gives it; 0 keeps the local output as it
            is.

    Returns:
        ``(B, H, T, D)`` in the dtype of ``local``; computed in float32 or wider.

    Raises:
        ShapeError: if ``local`` and ``memory`` differ in shape.
    """
    if local.shape != memory.shape:
        raise ShapeError(
            f"local and memory must have the same shape, got {tuple(local.shape)} and "
            f"{tuple(memory.shape)}"
        )
    precision = torch.promote_types(local.dtype, torch.float32)
    weight = share.to(precision).unsqueeze(-1)
    return torch.lerp(local.to(precision), memory.to(precision), weight).to(local.dtype)
