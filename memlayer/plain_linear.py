"""Plain linear maps in the place of those that a frozen model keeps otherwise.

A side network trains its own weights. Where the backbone keeps a linear map in few bits
(bitsandbytes, torchao) or with an adapter beside it (PEFT), the copy is one matrix that maps as it
does: whatever the library, the map of the unit vectors is that matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memlayer.modes import evaluating

if TYPE_CHECKING:
    from torch import Tensor


def plain_linears(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """Go through the parts of a module that are linear maps kept otherwise.

    Args:
        module: not changed.
        dtype: of what such parts are called with.

    Yields:
        Such a part, and a linear layer that computes the same, float32.
    """
    inside: set[int] = set()
    for part in module.modules():
        if id(part) in inside or not is_linear(part):
            continue
        if hasattr(part, "base_layer") or any(is_packed(p) for p in part.parameters()):
            inside.update(id(below) for below in part.modules())
            yield part, _plain(part, dtype)


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is kept in few bits, and cannot be trained as it is."""
    if hasattr(weight, "full_tensor"):  # in pieces, each of them plain
        return False
    few = not weight.dtype.is_floating_point or weight.element_size() < 2  # or float8, with a scale
    return few or type(weight.data) is not torch.Tensor


def unpacked(weight: Tensor) -> Tensor:
    """Give a weight's numbers, of whatever form, as an ordinary tensor."""
    if hasattr(weight, "full_tensor") or type(weight.data) is torch.Tensor:
        return weight
    return weight.dequantize()


def is_linear(part: nn.Module) -> bool:
    """Whether it is a linear map of whatever library, by the sizes that it names."""
    return hasattr(part, "in_features") and hasattr(part, "out_features")


@torch.no_grad()
def _plain(part: Any, dtype: torch.dtype) -> nn.Linear:
    device = next(part.parameters()).device
    units = torch.eye(part.in_features, dtype=dtype, device=device)
    with evaluating(part):
        images, zero = part(units[None])[0].float(), part(torch.zeros_like(units[:1])[None])[0]
    # An adapter may bring a bias of its own, and so may have none at zero.
    bias = getattr(getattr(part, "base_layer", part), "bias", None) is not None or bool(zero.any())
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear, part.in_features, part.out_features, bias=bias, device=device
    )
    made.weight.copy_((images - zero.float()).T)
    if bias:
        made.bias.copy_(zero[0])
    return made
