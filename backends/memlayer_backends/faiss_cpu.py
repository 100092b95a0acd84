"""Exact search with faiss on the CPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from memlayer_backends._faiss_flat import FaissFlatBackend


class FaissBackend(FaissFlatBackend):
    """Exact inner-product search with faiss on the CPU, wherever the queries come from.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where queries come from and results go to.
    """

    name = "faiss"
    keeps_keys_on_cpu = True

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say what is missing and how to install it, or give None."""
        if find_spec("faiss") is None:
            return 'faiss is not installed: pip install "memlayer-lm[faiss]"'
        return None

    def _nearest(self, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # Here and not above: on macOS, faiss and torch in one process can crash.
        import faiss

        scores, positions = faiss.knn(
            queries.numpy(), keys.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return torch.from_numpy(scores), torch.from_numpy(positions)
