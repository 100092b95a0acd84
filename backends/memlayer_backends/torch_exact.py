"""Exact search in PyTorch, on the CPU or a GPU.

With ``storage="bfloat16"`` vectors take half the memory, and products are taken in half width: they
find more candidates than are asked for, of which float32 products with the stored vectors choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlayer.errors import ConfigError
from memlayer_backends._checks import check_whole_number
from memlayer_backends.blocked_search import Block, BlockedSearch, block_memory
from memlayer_backends.buffered import BufferedBackend
from memlayer_backends.key_buffer import whole_groups
from memlayer_backends.rescoring import best_of

CPU_MEGABYTES = 16
GPU_MEGABYTES = 512

ROWS = 256
"""Queries of a block on a CPU. Fewer make products slower; more leave room for less of a lane."""

SLOTS = 8192
"""Slots of a lane that a block on a CPU has room for at least, however small it is."""

STEP = 2**19
"""Scores, 2 MiB, of one product on a CPU: their maxima are taken while they are in its cache."""


STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CANDIDATES = 2
"""Vectors looked at again in float32 for each one asked for, after products in half width."""


@dataclass(frozen=True, kw_only=True)
class TorchOptions:
    """Options of the ``torch`` backend."""

    block_megabytes: int | None = None
    """Scores held at a time, in MiB, though on a GPU never less than one query's of every lane.
    None: 16 on the CPU, about its cache, and 512 on a GPU."""

    storage: str = "float32"
    """What vectors are kept in: ``"float32"``, or ``"bfloat16"`` for half the memory. Scores are
    then those of the rounded vectors, and a vector near the last place may be missed."""

    def __post_init__(self) -> None:
        if self.storage not in STORAGE:
            raise ConfigError(f"storage must be 'float32' or 'bfloat16', got {self.storage!r}")
        if self.block_megabytes is not None:
            check_whole_number("block_megabytes", self.block_megabytes, minimum=1)


class TorchBackend(BufferedBackend):
    """Exact inner-product search, in float32 unless vectors are stored in less.

    Args:
        lanes: independent sets of vectors.
        dim: length of every vector.
        device: where vectors are kept and searched.
        options: fields of `TorchOptions`.
    """

    name = "torch"
    options_type = TorchOptions

    options: TorchOptions

    @property
    def exact(self) -> bool:
        """Whether vectors are kept as they come."""
        return self.storage == torch.float32

    @property
    def storage(self) -> torch.dtype:
        """What vectors are kept in."""
        return STORAGE[self.options.storage]

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search all lanes at once on a GPU, and what fits in the cache at once on a CPU."""
        if self.exact:
            return self._best(queries, k)
        candidates = min(CANDIDATES * k, self.buffer.occupancy().n_slots)
        scores, ids = self._best(queries.to(self.storage), candidates)
        return best_of(self.buffer, queries, ids.masked_fill_(scores == -torch.inf, -1), k)

    def _best(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        occupancy = self.buffer.occupancy()
        choose = _cpu_block if self.device.type == "cpu" else _gpu_block
        block = choose(
            self.lanes, queries.shape[1], occupancy.n_slots, self.options.block_megabytes
        )
        memory = queries.new_empty(block_memory(block))
        search = BlockedSearch(
            keys=self.buffer.keys, occupancy=occupancy, block=block, memory=memory
        )
        scores, slots = search.best(queries, k)
        return scores, occupancy.ids(slots)


def _cpu_block(lanes: int, queries: int, slots: int, megabytes: int | None) -> Block:
    fit = (megabytes or CPU_MEGABYTES) * 2**18  # scores
    queries = min(queries, ROWS, fit // SLOTS)
    # A few queries less if that spares cutting the lane, which doubles the work behind products.
    if fit >= slots * (ROWS // 2):
        queries = min(queries, fit // slots)
    slots = whole_groups(-(-slots // -(-queries * slots // fit)))
    # Little work in many steps would be mostly Python: a quarter of what fits, in one product.
    lanes = min(lanes, max(1, fit // 4 // (queries * slots)))
    step = slots if lanes > 1 else whole_groups(STEP * torch.get_num_threads() // queries)
    return Block(lanes=lanes, queries=queries, slots=slots, step=step)


def _gpu_block(lanes: int, queries: int, slots: int, megabytes: int | None) -> Block:
    fit = (megabytes or GPU_MEGABYTES) * 2**18
    queries = min(queries, max(1, fit // (lanes * slots)))
    return Block(lanes=lanes, queries=queries, slots=slots, step=slots)
