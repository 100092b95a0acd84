"""Find the module whose output is what an attention multiplied.

A product's operand has ``H`` heads of ``D`` numbers a token. A module's output is cut into slices
of ``D``, and each head looks for the slice that holds its own numbers (up to one factor: some
families scale their queries first). So every layout of a fused projection is found: thirds, by
head, by group, of one head for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from memlayer.discovery.products import close, tolerance

if TYPE_CHECKING:
    from memlayer.discovery.probe import Event
    from memlayer.discovery.products import Product


@dataclass(frozen=True)
class Match:
    """A module that gives one operand.

    Attributes:
        path: the module.
        heads: for each head of the operand, the slice of ``D`` numbers that is its own.
        heads_first: whether the output is ``(B, heads, T, D)``.
        output: ``(B, T, slices, D)``.
    """

    path: str
    heads: tuple[int, ...]
    heads_first: bool
    output: Tensor

    def operand(self) -> Tensor:
        """Give the operand as the module gave it: ``(B, H, T, D)``."""
        return self.output[:, :, list(self.heads)].transpose(1, 2)


def match(operand: Tensor, events: Sequence[Event], tokens: Sequence[int]) -> Match | None:
    """Give the last module whose output holds an operand at some tokens, if one does.

    Args:
        operand: ``(B, H, T, D)``.
        events: what happened before the product.
        tokens: where to compare: only token 0 for what may be rotated.
    """
    for event in reversed(events):
        if event.output is None:
            continue
        for heads_first in (False, True):
            slices = _slices(event.output, operand, heads_first)
            if slices is None:
                continue
            heads = _heads(operand, slices, tokens)
            if heads is not None:
                return Match(event.path, heads, heads_first, slices)
    return None


def _slices(output: Tensor, operand: Tensor, heads_first: bool) -> Tensor | None:
    """Cut an output into ``(B, T, slices, D)``, if it can be."""
    batch, _, tokens, dim = operand.shape
    if heads_first:
        if output.dim() != 4 or output.shape[2] != tokens:
            return None
        output = output.transpose(1, 2)
    if output.dim() < 3 or tuple(output.shape[:2]) != (batch, tokens):
        return None
    flat = output.reshape(batch, tokens, -1)
    return flat.unflatten(2, (-1, dim)) if flat.shape[2] % dim == 0 else None


def _heads(operand: Tensor, slices: Tensor, tokens: Sequence[int]) -> tuple[int, ...] | None:
    own = operand[:, :, list(tokens)].transpose(0, 1).flatten(1).double()
    there = slices[:, list(tokens)].flatten(0, 1).transpose(0, 1).flatten(1).double()
    there = there.to(own.device)
    likeness = functional.normalize(own, dim=1) @ functional.normalize(there, dim=1).T
    best, heads = likeness.max(dim=1)
    error = tolerance(operand.dtype)
    if bool((best < 1 - error**2).any()):
        return None
    chosen = there[heads]
    factors = own.norm(dim=1) / chosen.norm(dim=1)
    if bool(((factors - factors[0]).abs() > error * factors[0]).any()):
        return None
    return tuple(heads.tolist())


def knows_positions(found: Match, given: Tensor) -> bool:
    """Whether a module's output tells apart the same token at two places.

    Args:
        found: in the first layer.
        given: what the layer was given, ``(B, T, E)``: of tokens 0 and 1, which are the same.
    """
    if not close(given[:, 0], given[:, 1]):
        return False  # learned positions are in the layer's very input
    return not close(found.output[:, 0], found.output[:, 1])


def scaling_of(product: Product, query: Match, key: Match) -> float | None:
    """Give the factor between queries times keys, as projected, and what the softmax got.

    The last token's scores of two keys are compared: what is the same for both (a maximum that is
    taken off) or for every row (a bias, a slope) cancels. None if there is no such factor.
    """
    last = product.query[:, :, -1:].double()
    keys = product.key[:, :, [0, -1]].double().to(last.device)
    scores = product.scores[:, :, -1, [0, -1]].double().to(last.device)
    products = (last * keys).sum(dim=-1)
    got, made = ((one[..., 1] - one[..., 0]) for one in (scores, products))
    got, made = got - got.mean(dim=0), made - made.mean(dim=0)
    size = float((made * made).sum())
    if size == 0:
        return None
    factor = float((made * got).sum()) / size
    error = float((got - factor * made).norm())
    # A soft cap bends what is far from 0 and leaves the rest: that much may differ.
    if error > max(20 * tolerance(product.scores.dtype), 1e-2) * float(got.norm()):
        return None
    return factor * _factor(product.query, query) * _factor(product.key, key)


def _factor(operand: Tensor, found: Match) -> float:
    """Give what an operand was multiplied by after its module gave it."""
    return float(operand[:, :, 0].double().norm() / found.operand()[:, :, 0].double().norm())


def same_groups(heads: Sequence[int], count: int) -> bool:
    """Whether query heads share ``count`` key heads in order, as many each."""
    if len(heads) % count:
        return False
    each = len(heads) // count
    return all(len(set(heads[n : n + each])) == 1 for n in range(0, len(heads), each)) and (
        len(set(heads)) == count
    )


def distinct(heads: Sequence[int]) -> tuple[int, ...]:
    """Give the slices in order, each once."""
    return tuple(dict.fromkeys(heads))


def close_rows(first: Tensor, second: Tensor) -> bool:
    """Whether two operands are the same at every token, to one factor."""
    first, second = first.double(), second.double().to(first.device)
    factor = float((first * second).sum()) / max(float((second * second).sum()), 1e-30)
    return close(first.to(torch.float32), (factor * second).to(torch.float32))
