"""Chunks of a bank in main memory, brought to the device of the queries that found them.

    places (B, H, T, n) ─► each chunk once, in the order of storage ─► device, and places in those

What a segment's tokens find overlaps: neighbours look for the same, and so do the query heads of a
group. So each chunk is copied once for all of them, keys and values apart; attention reads the
copies as it would read the bank. In the order of storage, a bank that is mapped from a file is read
from front to back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PIECE_BYTES = 2**23
"""Gathered at a time. On its way to a GPU, the next piece is gathered while this one travels."""


def bring(
    stores: Sequence[Tensor], places: Tensor, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Copy the chunks that were found out of main memory, each once.

    Args:
        stores: ``(chunks, C, D)`` each, on the CPU, maybe mapped from a file.
        places: any shape, int64, positions in every store.
        device: where the copies go.

    Returns:
        For each store its copied chunks, ``(distinct, C, D)``, and positions in these, of the shape
        of ``places``.
    """
    distinct, positions = places.unique(return_inverse=True)
    wanted = distinct.cpu()
    return [_copy(store, wanted, device) for store in stores], positions.view_as(places)


def _copy(store: Tensor, wanted: Tensor, device: torch.device) -> Tensor:
    chunk = store.shape[1:]
    copies = torch.empty(len(wanted), *chunk, dtype=store.dtype, device=device)
    piece = max(1, _PIECE_BYTES // (chunk.numel() * store.element_size()))
    for start in range(0, len(wanted), piece):
        part, place = wanted[start : start + piece], copies[start : start + piece]
        if device.type == "cpu":
            torch.index_select(store, 0, part, out=place)
            continue
        # Page-locked on its way to a GPU, so that the copy need not be waited for; torch keeps it
        # until that is done.
        on_gpu = device.type == "cuda"
        staged = torch.empty(place.shape, dtype=store.dtype, pin_memory=on_gpu)
        torch.index_select(store, 0, part, out=staged)
        place.copy_(staged, non_blocking=True)
    return copies
