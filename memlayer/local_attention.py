"""What a layer's own attention was called with, and what its softmax divided by.

One softmax over local and retrieved tokens needs the local one's denominator, which no attention
kernel that is fit for training gives. So the call is looked at while it happens, whatever the
family does to its queries and keys before it, and the denominator is computed from what was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from memlayer.errors import ConfigError

_BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**27}
"""Scores at a time."""


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one `torch.nn.functional.scaled_dot_product_attention`.

    Attributes:
        query: ``(B, H, T, D)``, with whatever makes positions of it (rotation) applied.
        key: ``(B, H or H_kv, S, D)``, likewise; those of a cache come first.
        mask: broadcastable to ``(B, H, T, S)``: bool, True for what is seen, or added to scores.
        causal: whether token t sees the first t + 1 keys; without a mask.
        scaling: factor on ``q . k``.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float

    def log_mass(self) -> Tensor:
        r"""Give what each query's softmax divides by, :math:`\log \sum_i \exp(s\, q_t \cdot k_i)`.

        Returns:
            ``(B, H, T)``, float32 or wider; ``-inf`` where a token sees nothing. Gradients flow to
            queries and keys. Scores exist for a block of queries at a time.
        """
        with torch.autocast(self.query.device.type, enabled=False):
            mass: Tensor = _LogMass.apply(  # type: ignore[no-untyped-call]
                self.query, self.key, self.mask, self.causal, self.scaling
            )
        return mass


class AttentionWatch(TorchFunctionMode):
    """Notes the last attention call while it is entered; all is run as always.

    Attributes:
        call: None before the first one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call: AttentionCall | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run any function of torch."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.call = _attention_call(*args, **kwargs)
        return func(*args, **kwargs)


def other_attention(config: Any) -> ConfigError:
    """Say that a model's attention cannot be looked at; ``config`` is its decoder's."""
    return ConfigError(
        'fusion="softmax" needs attention by torch\'s scaled_dot_product_attention, and '
        f"{config.model_type} runs {config._attn_implementation!r} here; load the backbone with "
        'attn_implementation="sdpa", or take fusion="gate"'
    )


def _attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """Take the arguments as the function itself names them."""
    scaling = query.shape[-1] ** -0.5 if scale is None else scale
    return AttentionCall(query, key, attn_mask, is_causal, scaling)


class _LogMass(torch.autograd.Function):
    """Blocked over queries; the backward pass computes the scores again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scaling: float
    ) -> Tensor:
        ctx.mask, ctx.causal, ctx.scaling = mask, causal, scaling
        mass = query.new_empty(
            query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32)
        )
        # (B, H_kv, G, T): heads that share a key stand side by side.
        grouped = mass.unflatten(1, (key.shape[1], -1))
        for rows, scores, _, _ in _blocks(ctx, query, key):
            grouped[..., rows] = torch.logsumexp(scores, dim=-1)
        ctx.save_for_backward(query, key, mass)
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mass: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, key, mass = ctx.saved_tensors
        heads = (key.shape[1], -1)
        grouped_mass, grouped_grad = mass.unflatten(1, heads), grad_mass.unflatten(1, heads)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=mass.dtype, device=key.device)
        for rows, scores, queries, keys in _blocks(ctx, query, key):
            # A token that sees nothing has no softmax: exp(-inf + inf).
            weights = (scores - grouped_mass[..., rows].unsqueeze(-1)).exp_().nan_to_num_(nan=0.0)
            weights *= (grouped_grad[..., rows] * ctx.scaling).unsqueeze(-1)
            grad_query.unflatten(1, heads)[..., rows, :] = weights @ keys
            seen = keys.shape[-2]
            grad_key[:, :, :seen] += (weights.transpose(-1, -2) @ queries).sum(dim=2)
        return grad_query, grad_key.to(key.dtype), None, None, None


def _blocks(ctx: Any, query: Tensor, key: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Go through blocks of rows: scores ``(B, H_kv, G, t, S)``, their queries and keys."""
    batch, heads, tokens, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    queries = query.unflatten(1, (key.shape[1], -1)).to(precision)
    keys = key.unsqueeze(2).to(precision)
    mask = ctx.mask
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, key.shape[2]).unflatten(1, (key.shape[1], -1))
    of_row = batch * heads * key.shape[2] * precision.itemsize
    block_bytes = _BLOCK_BYTES.get(query.device.type, _BLOCK_BYTES["cuda"])
    size = max(1, block_bytes // of_row)
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        seen = keys[..., : rows.stop, :] if ctx.causal else keys
        scores = queries[..., rows, :] @ seen.transpose(-1, -2) * ctx.scaling
        if ctx.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill_(later.triu_(1 + start), -torch.inf)
        elif mask is not None:
            part = mask[..., rows, :]
            if part.dtype == torch.bool:
                scores = scores.masked_fill_(~part, -torch.inf)
            else:
                scores = scores + part
        yield rows, scores, queries[..., rows, :], seen
