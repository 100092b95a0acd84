r"""Low-rank updates of frozen linear maps (LoRA, arXiv:2106.09685).

A map :math:`W` in a side layer that shares the backbone's weights becomes

.. math:: x \mapsto W x + 2\, B A x

with ``A`` drawn at random, always in the same way, and ``B`` at zero, so that nothing has changed
before training and every process of a run starts alike. The update is a hook on the twin of the
backbone's layer: whatever form the backbone keeps its weights in (few bits, an adapter of somebody
else's) stays, and only ``A`` and ``B`` are trained and saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from memlayer.errors import UnsupportedModelError
from memlayer.plain_linear import is_linear

SCALE = 2.0
"""On every update, whatever its rank: LoRA's alpha at twice the rank, the usual one."""


class LowRankUpdate(nn.Module):
    """What is added to one linear map.

    Attributes:
        down: ``(rank, in_features)``, :math:`A`.
        up: ``(out_features, rank)``, :math:`B`.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        down = torch.empty(rank, in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """Give :math:`2 B A x`: ``(..., in_features)`` to ``(..., out_features)``."""
        inner = functional.linear(inputs.to(self.down.dtype), self.down)
        outer: Tensor = functional.linear(SCALE * inner, self.up)
        return outer

    def add(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the update to the map's output; a forward hook of its module."""
        update: Tensor = self(args[0])
        return output + update.to(output.dtype)


def add_updates(layer: nn.Module, rank: int, seed: int) -> nn.Module:
    """Give every linear map of a layer a low-rank update.

    Args:
        layer: gets the hooks; its weights are not touched.
        rank: of each update.
        seed: of what is drawn.

    Returns:
        The updates alone, each under its map's path; float32, on the CPU.

    Raises:
        UnsupportedModelError: if the layer has no linear maps.
    """
    updates, generator = nn.Module(), torch.Generator().manual_seed(seed)
    for path, module, sizes in _linear_maps(layer):
        *parents, name = path.split(".")
        place = updates
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        update = LowRankUpdate(*sizes, rank, generator)
        place.add_module(name, update)
        # A bound method: a copy of the layer is then bound to a copy of the update.
        module.register_forward_hook(update.add)
    if not any(True for _ in updates.parameters()):
        raise UnsupportedModelError(
            f"side_rank needs linear maps in {type(layer).__name__}, which has none; leave "
            "side_rank at None"
        )
    return updates


def _linear_maps(layer: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    """Go through path, module and sizes of a layer's maps; one with an adapter counts once."""
    inside: set[int] = set()
    for path, module in layer.named_modules():
        sizes = _sizes(module)
        if sizes is not None and id(module) not in inside:
            inside.update(id(below) for below in module.modules())
            yield path, module, sizes


def _sizes(module: Any) -> tuple[int, int] | None:
    """Give a linear map's features in and out; None for any other module."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return (module.in_features, module.out_features) if is_linear(module) else None
