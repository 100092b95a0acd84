"""Exact search in PyTorch: one batched product over all lanes, on the CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memlayer_backends._checks import check_whole_number
from memlayer_backends.buffered import BufferedBackend
from memlayer_backends.key_buffer import GROUP


@dataclass(frozen=True, kw_only=True)
class TorchOptions:
    """Options of the ``torch`` backend."""

    block_megabytes: int | None = None
    """Scores held at a time, in MiB, though never less than one query of every lane. None: 32 on
    the CPU, about its cache, and 512 on a GPU."""

    def __post_init__(self) -> None:
        if self.block_megabytes is not None:
            check_whole_number("block_megabytes", self.block_megabytes, minimum=1)


class TorchBackend(BufferedBackend):
    """Exact inner-product search, float32 whatever the dtype of keys and queries.

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
        """Always."""
        return True

    def search_keys(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search all lanes at once, a block of queries after the other."""
        occupancy = self.buffer.occupancy()
        n_slots = occupancy.n_slots
        keys = self.buffer.keys[:, :n_slots].transpose(1, 2)  # (lanes, dim, N)
        per_query = self.lanes * n_slots
        block = min(max(1, self._block_bytes() // (4 * per_query)), queries.shape[1])
        # Reused: fresh pages for every block take longer than the product itself.
        memory = torch.empty(block * per_query, device=keys.device)
        scores, slots = [], []
        for some in torch.split(queries, block, dim=1):
            shape = (self.lanes, some.shape[1], n_slots)
            products = memory[: some.shape[1] * per_query].view(shape)
            torch.bmm(some, keys, out=products)
            products[..., occupancy.free_start : occupancy.free_stop].masked_fill_(
                occupancy.free[:, None], -torch.inf
            )
            best, where = top_k(products, k)
            scores.append(best)
            slots.append(where)
        return torch.cat(scores, 1), occupancy.ids(torch.cat(slots, 1))

    def _block_bytes(self) -> int:
        default = 32 if self.device.type == "cpu" else 512
        return (self.options.block_megabytes or default) * 2**20


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` largest scores and their positions, largest first.

    Where the row is long, in two stages: the maximum of every group of 64, then only the groups
    with the ``k`` largest maxima. That is exact: a score outside of them is at most its own
    group's maximum, so at least ``k`` others are as large.

    Args:
        scores: ``(lanes, q, N)``, contiguous, N a multiple of 64.
        k: at most N.

    Returns:
        Scores and positions, ``(lanes, q, k)``.
    """
    n_groups = scores.shape[-1] // GROUP
    if n_groups < 8 * k:
        return _topk(scores, k)
    groups = scores.view(*scores.shape[:-1], n_groups, GROUP)
    best_groups = groups.amax(-1).topk(k, sorted=False).indices  # (lanes, q, k)
    within = best_groups[..., None].expand(*best_groups.shape, GROUP)
    values, chosen = _topk(groups.gather(2, within).flatten(2), k)
    positions = best_groups.gather(2, chosen // GROUP) * GROUP + chosen % GROUP
    return values, positions


def _topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, positions = scores.topk(k)
    return values, positions
