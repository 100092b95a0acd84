"""Exact search with faiss on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from memlayer.errors import ConfigError
from memlayer_backends._checks import check_whole_number
from memlayer_backends._faiss_flat import FaissFlatBackend

MAX_K = 2048
"""The most that faiss selects per query on a GPU."""

INSTALL = 'pip install "memlayer-lm[faiss-gpu]"'


@dataclass(frozen=True, kw_only=True)
class FaissGpuOptions:
    """Options of the ``faiss-gpu`` backend."""

    temp_memory_megabytes: int | None = None
    """GPU memory that faiss sets aside for its intermediate results, in MiB, once per device for
    all backends that give the same number. None: faiss decides, up to 1.5 GiB."""

    def __post_init__(self) -> None:
        if self.temp_memory_megabytes is not None:
            check_whole_number("temp_memory_megabytes", self.temp_memory_megabytes, minimum=0)


class FaissGpuBackend(FaissFlatBackend):
    """Exact inner-product search with faiss on the GPU that holds the vectors.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: a CUDA device.
        options: fields of `FaissGpuOptions`.

    Raises:
        ConfigError: if ``device`` is not a CUDA device.
    """

    name = "faiss-gpu"
    options_type = FaissGpuOptions

    options: FaissGpuOptions

    def __init__(
        self, *, lanes: int, dim: int, device: torch.device | str = "cuda", **options: Any
    ) -> None:
        super().__init__(lanes=lanes, dim=dim, device=device, **options)
        if self.device.type != "cuda":
            raise ConfigError(
                f"backend 'faiss-gpu' needs a CUDA device, got device={str(device)!r}; move the "
                "model there or use backend 'faiss'"
            )

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Say what is missing and how to get it, or give None."""
        if find_spec("faiss") is None:
            return f"faiss is not installed: {INSTALL}"
        try:
            import faiss
        except ImportError as error:
            return f"faiss cannot be imported ({error}): {INSTALL}"
        if not hasattr(faiss, "StandardGpuResources"):
            return f"faiss is installed without GPU support: pip uninstall faiss-cpu && {INSTALL}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here: use backend 'faiss' or 'torch'"
        if not faiss.get_num_gpus():
            return (
                "faiss finds no CUDA device here, though torch does: check that faiss-gpu's CUDA "
                "runtime fits the driver, or use backend 'torch'"
            )
        return None

    def _nearest(self, queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if k > MAX_K:
            raise ConfigError(
                f"backend 'faiss-gpu' finds at most {MAX_K} vectors per query, got k={k}; "
                "lower top_k or use backend 'torch'"
            )
        import faiss

        device = torch.cuda.current_device() if keys.device.index is None else keys.device.index
        scores, positions = faiss.knn_gpu(
            _resources(device, self.options.temp_memory_megabytes),
            queries,
            keys,
            k,
            metric=faiss.METRIC_INNER_PRODUCT,
            device=device,
        )
        return scores, positions


@cache
def _resources(device: int, temp_memory_megabytes: int | None) -> Any:
    import faiss

    # Teaches faiss.knn_gpu to take torch tensors, on torch's current stream.
    import faiss.contrib.torch_utils

    with torch.cuda.device(device):
        resources = faiss.StandardGpuResources()
        if temp_memory_megabytes is not None:
            resources.setTempMemory(temp_memory_megabytes * 2**20)
    return resources
