"""Exact search with faiss on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from memlayer_backends._checks import read_options
from memlayer_backends._faiss_flat import FaissFlatBackend


@dataclass(frozen=True, kw_only=True)
class FaissOptions:
    """Options of the ``faiss`` backend: none."""


class FaissBackend(FaissFlatBackend):
    """Exact inner-product search with faiss on the CPU, wherever the queries come from.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
        options: fields of `FaissOptions`.
    """

    name = "faiss"
    keeps_keys_on_cpu = True

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        self.options = read_options(FaissOptions, self.name, options)
        super().__init__(lanes=lanes, dim=dim, device=device)

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say what is missing and how to install it, or give None."""
        if find_spec("faiss") is None:
            return 'faiss is not installed: pip install "memlayer-lm[faiss]"'
        return None

    def _options_to_save(self) -> Mapping[str, Any]:
        return asdict(self.options)

    def _nearest(self, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # Here and not above: on macOS, faiss and torch in one process can crash.
        import faiss

        scores, positions = faiss.knn(
            queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(scores), torch.from_numpy(positions)
