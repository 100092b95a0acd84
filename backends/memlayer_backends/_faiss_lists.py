"""Inverted lists of one lane: vectors near one centroid lie together, and a search reads a few.

Inner product is no distance, and faiss's own recipe for it (lists by largest product with the
centroid) puts the vectors of a language model into a few huge lists. Here a vector goes to its
*nearest* centroid, and a query reads the lists whose centroids have the largest *products* with
it. For a query ``q`` and a vector ``x`` near a centroid ``c``, ``q @ x = q @ c + q @ (x - c)``: the
first term is known, and the second is small because ``x - c`` is, in the metric of the queries
(`KeySpace`).

Lists hold half-width copies: 15 to 30 % quicker to read than float32, and half the memory. They
find candidates; whoever has the vectors themselves gives the scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from memlayer_backends.key_space import KeySpace, QueryMoments

POINTS_PER_LIST = 24
"""Vectors that the centroids are trained on, per list. Twice as many find no more on real keys."""

ITERATIONS = 4
"""Rounds of k-means. Twice as many find no more on real keys."""


def default_n_lists(count: int) -> int:
    """Give the lists for a lane of ``count`` vectors."""
    return min(4 * math.isqrt(count), count)


def default_n_probe(n_lists: int) -> int:
    """Give the lists to read for a recall of 0.95, with ``k`` 16, on keys of a language model.

    Fitted to SmolLM2's reading of novels, 4,096 to 262,144 vectors in lists by `default_n_lists`.
    """
    return 24 + n_lists // 24


class LaneLists:
    """Inverted lists over one lane's vectors, which have consecutive ids.

    Attributes:
        n_lists: lists that there are.
        trained_on: vectors that were held when the centroids were trained.
        trained_until: the id that followed then; once the oldest id reaches it, none of them is
            left.
        fitted_to: queries that the space was fitted to.
        next_id: the id that the next vector gets.

    Args:
        keys: ``(n, dim)``, float32, on the CPU, n > 0. What the lane holds.
        first_id: id of the first of them.
        n_lists: at most n.
        moments: what was asked so far.
        lane: whose moment of these it is.
    """

    def __init__(
        self, keys: Tensor, first_id: int, *, n_lists: int, moments: QueryMoments, lane: int
    ) -> None:
        # Here and not above: on macOS, faiss and torch in one process can crash.
        import faiss

        dim = keys.shape[1]
        self.n_lists = n_lists
        self.trained_on = len(keys)
        self.trained_until = first_id + len(keys)
        self.fitted_to = int(moments.counts[lane])
        self.next_id = self._first_id = first_id
        # A step through the lane, oldest to newest, rather than a draw: every text has its part.
        sample = keys[:: max(1, len(keys) // (POINTS_PER_LIST * n_lists))]
        self._space = KeySpace.of(sample, moments.of(lane))
        self._centroids = _train(self._space.keys(sample), n_lists)
        self._quantizer = faiss.IndexFlatIP(dim)
        self._quantizer.add(self._centroids.numpy())
        self._index = faiss.IndexIVFScalarQuantizer(
            self._quantizer,
            dim,
            n_lists,
            faiss.ScalarQuantizer.QT_fp16,
            faiss.METRIC_INNER_PRODUCT,
            False,  # vectors themselves, not what they differ from their centroid by
        )
        self._index.train(self._centroids.numpy())
        self.add(keys)

    def __len__(self) -> int:
        """Count the vectors in the lists, with removed ones that still lie there."""
        return int(self._index.ntotal)

    def add(self, keys: Tensor) -> None:
        """Put vectors ``(n, dim)`` into the lists of their nearest centroids."""
        import faiss

        if not len(keys):
            return
        vectors = self._space.keys(keys).numpy()
        _, nearest = faiss.knn(vectors, self._centroids.numpy(), 1)
        ids = torch.arange(self.next_id, self.next_id + len(keys)).numpy()
        # Not `add`, which would choose the lists by largest product.
        lists = nearest[:, 0].copy()
        self._index.add_core(
            len(keys), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(lists)
        )
        self.next_id += len(keys)

    def remove_before(self, first_id: int) -> None:
        """Find no vector with a smaller id from now on.

        They leave the lists together, once they are more than a quarter of what is held: a pass
        over all ids for as many removals, which is O(1) amortised.
        """
        import faiss

        self._first_id = first_id
        left = self.next_id - first_id
        if 4 * (len(self) - left) > left:
            self._index.remove_ids(faiss.IDSelectorRange(0, first_id))

    def search(self, queries: Tensor, k: int, *, n_probe: int | None) -> Tensor:
        """Search the lists whose centroids have the largest products with a query.

        Args:
            queries: ``(q, dim)``, float32, contiguous, on the CPU.
            k: vectors to find.
            n_probe: lists to read for each query. None: `default_n_probe` says.

        Returns:
            Ids ``(q, k)``, best first; -1 where the lists that were read hold no more.
        """
        import faiss

        probed = min(n_probe or default_n_probe(self.n_lists), self.n_lists)
        held = faiss.IDSelectorRange(self._first_id, self.next_id)
        params: Any = faiss.SearchParametersIVF()
        params.nprobe = probed
        params.sel = held
        _, ids = self._index.search(self._space.queries(queries).numpy(), k, params=params)
        return torch.from_numpy(ids)


def _train(keys: Tensor, n_lists: int) -> Tensor:
    """Give centroids ``(n_lists, dim)``, the same for the same keys."""
    import faiss

    settings = faiss.ClusteringParameters()
    settings.niter = ITERATIONS
    settings.seed = 0
    settings.min_points_per_centroid = 1
    settings.max_points_per_centroid = 2 * POINTS_PER_LIST
    clustering: Any = faiss.Clustering(keys.shape[1], n_lists, settings)
    clustering.train(keys.numpy(), faiss.IndexFlatL2(keys.shape[1]))
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids)).view(n_lists, -1)
