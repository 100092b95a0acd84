"""See the attention products of code that was not written to be seen.

Whatever a family calls its parts, softmax attention is a product of queries and keys, a softmax,
and a product with values: eager code as three calls, SDPA as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Product:
    """One attention.

    Attributes:
        query: ``(B, H, T, D)``, as multiplied: rotated where the family rotates.
        key: ``(B, H, T, D)``, as multiplied, repeated to as many heads as queries.
        value: ``(B, H, T, D_v)``, likewise.
        scores: ``(B, H, T, T)``, what the softmax got: scaled, with mask and biases.
        output: ``(B, H, T, D_v)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    output: Tensor


class ProductRecorder(TorchFunctionMode):
    """Note attention products while entered.

    Args:
        batch: B of the probe.
        tokens: T of the probe.
        keep: called with every product.
    """

    def __init__(self, batch: int, tokens: int, keep: Callable[[Product], None]) -> None:
        super().__init__()
        self._batch, self._tokens, self._keep = batch, tokens, keep
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._scores: Tensor | None = None

    def begin(self) -> None:
        """Forget what began before: the next module's products are its own."""
        self._pairs, self._scores = [], None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, and note it if it is part of an attention."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self._note_whole(args, kwargs, result)
        elif name in _PRODUCTS and isinstance(result, Tensor):
            factors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
            self._note_product(factors[-2], factors[-1], result)
        elif name == "softmax" and args and self._is_scores(args[0]):
            self._scores = args[0]
        return result

    def _is_scores(self, scores: Tensor) -> bool:
        """Whether these are ``(..., T, T)``, or one more where there is an attention sink."""
        tokens = self._tokens
        return scores.dim() >= 3 and scores.shape[-2:] in ((tokens, tokens), (tokens, tokens + 1))

    def _note_product(self, first: Tensor, second: Tensor, result: Tensor) -> None:
        scores = self._scores
        if scores is None:
            if result.shape[-2:] == (self._tokens, self._tokens):
                self._pairs.append((first, second, result))
            return
        heads = scores.shape[:-1].numel()
        if first.shape[:-1].numel() != heads or first.shape[-1] != self._tokens:
            return
        for query, key, product in reversed(self._pairs):
            if product.shape[:-1].numel() == heads:
                made = Product(
                    query=self._by_head(query),
                    key=self._by_head(key.transpose(-1, -2)),
                    value=self._by_head(second),
                    scores=self._by_head(scores[..., : self._tokens]),
                    output=self._by_head(result),
                )
                self._keep(made)
                break
        self.begin()

    def _note_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = named["query"], named["key"], named["value"]
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        scores = scale * (query @ key.transpose(-1, -2))
        self._keep(Product(query=query, key=key, value=value, scores=scores, output=result))

    def _by_head(self, part: Tensor) -> Tensor:
        """Give ``(B, H, ...)`` where batch and heads are one dimension."""
        return part.unflatten(0, (self._batch, -1)) if part.dim() == 3 else part


_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm"})


def close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, to the rounding of their dtype."""
    if first.shape != second.shape:
        return False
    error = float((first.double() - second.to(first.device).double()).norm())
    return error <= tolerance(first.dtype) * max(float(first.double().norm()), 1e-12)


def tolerance(dtype: torch.dtype) -> float:
    """Give the relative error that is still rounding."""
    return 1e-4 if torch.finfo(dtype).bits > 16 else 2e-2
