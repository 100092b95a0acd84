r"""kNN-LM: the control that reads the same past without any training (arXiv:1911.00172).

    context t ─► hidden state h_t ─► index, beside the token that followed it

A later context looks for the nearest hidden states and lets the tokens behind them vote:

.. math:: p(w) = \lambda \sum_{i: w_i = w} \mathrm{softmax}_i(-\lVert h - h_i \rVert^2 / \tau)
          + (1 - \lambda) p_{LM}(w)

Hidden states are the decoder's last, behind its final norm. Distances come from a plug-in's search
for inner products: :math:`h \cdot h_i - \lVert h_i \rVert^2 / 2` falls as the distance grows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memlayer.retrieval import RetrievalBackend


class NearestTokens:
    r"""Contexts of one document, and the tokens that followed them.

    Args:
        index: an empty backend with one lane of E + 1 numbers.
        capacity: contexts kept; the oldest goes first.
        neighbors: contexts that vote.
        weight: :math:`\lambda`, between 0 and 1.
        temperature: :math:`\tau`, of squared distances.
    """

    def __init__(
        self,
        index: RetrievalBackend,
        *,
        capacity: int,
        neighbors: int,
        weight: float,
        temperature: float,
    ) -> None:
        self._index = index
        self._capacity = capacity
        self._neighbors = neighbors
        self._weight = weight
        self._temperature = temperature
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._waiting = torch.empty(0, index.dim - 1)
        self._written = 0

    def push(self, hidden: Tensor, next_tokens: Tensor) -> None:
        """Append contexts, which wait until their window was left.

        Args:
            hidden: ``(n, E)``.
            next_tokens: ``(n,)``, int64, the token that follows each.
        """
        self._waiting = torch.cat([self._waiting.to(hidden.device), hidden.float()])
        self._tokens = torch.cat([self._tokens, next_tokens.cpu()])

    def write_before(self, position: int) -> None:
        """Let contexts before a position vote from now on."""
        count = position - self._written
        if count == 0:
            return
        keys, self._waiting = self._waiting[:count], self._waiting[count:]
        square = keys.square().sum(dim=1, keepdim=True) / -2
        self._index.add(torch.cat([keys, square], dim=1)[None])
        surplus = int(self._index.counts()[0]) - self._capacity
        if surplus > 0:
            self._index.remove_oldest(surplus)
        self._written = position

    def votes(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ask the nearest contexts of each context.

        Args:
            hidden: ``(n, E)``, contexts.
            targets: ``(n,)``, int64, the tokens that follow.

        Returns:
            ``(n, k)``, float32: squared distances, less what is the same for all of a row, negated;
            ``-inf`` where there is none. And ``(n, k)``, bool: whether the target followed there.
            Both on the CPU; None while there is nobody to ask.
        """
        if not self._written:
            return None
        queries = torch.cat([hidden.float(), torch.ones_like(hidden[:, :1]).float()], dim=1)
        found = self._index.search(queries[None], min(self._neighbors, self._written))
        ids = found.ids[0].cpu()
        agreeing = (self._tokens[ids.clamp(min=0)] == targets.cpu().unsqueeze(1)) & (ids >= 0)
        return 2 * found.scores[0].cpu(), agreeing

    def mixed(self, losses: Tensor, votes: tuple[Tensor, Tensor] | None) -> Tensor:
        """Mix votes into a language model's losses.

        Args:
            losses: ``(n,)``, float32, on the CPU, the language model's, nats.
            votes: what `votes` gave for the same contexts.

        Returns:
            ``(n,)``, like ``losses``; the very same while there is nobody to ask.
        """
        if votes is None:
            return losses
        return mix(losses, *votes, weight=self._weight, temperature=self._temperature)


def mix(
    losses: Tensor, closeness: Tensor, agreeing: Tensor, *, weight: float, temperature: float
) -> Tensor:
    r"""Mix votes into losses ``(n,)``; see `NearestTokens.votes` for the other two.

    Args:
        losses: nats.
        closeness: ``(n, k)``.
        agreeing: ``(n, k)``.
        weight: :math:`\lambda`.
        temperature: :math:`\tau`.
    """
    chance = (torch.softmax(closeness / temperature, dim=1) * agreeing).sum(dim=1)
    return -torch.logaddexp(chance.log() + math.log(weight), math.log1p(-weight) - losses)
