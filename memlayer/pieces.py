"""Tensors that FSDP2 keeps in pieces, one a process: read and written whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Give all of a tensor that may be in pieces; every process has to ask."""
    complete: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if complete is None else complete()


def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor that may be in pieces, in place."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        value = distribute_tensor(
            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    tensor.copy_(value)
