r"""The side network: the trainable layers that read what the backbone wrote.

Each side layer is a copy of a backbone layer, run by that layer's own code with the very arguments
(mask, positions, cache) that the backbone's layer was called with:

.. math:: s^0 = h^0, \qquad s^l = f_l(s^{l-1}) + (h^{rl} - h^{r(l-1)})

with :math:`h` the residual stream before any final norm. With ``side_init="identity"``,

.. math:: s^l = s^{l-1} + a_l (f_l(s^{l-1}) - s^{l-1}) + (1 - a_l) m_l + (h^{rl} - h^{r(l-1)})

where :math:`a_l` starts at 0, and :math:`m_l = W_o\, \sigma(g) (M - A)` is what memory changes in
the output of the layer's attention (0 in layers that read none). The sum of the residuals alone is
:math:`h^L`, so without memory the network starts as the backbone; memory enters at full strength
from the first step, and at :math:`a_l = 1` the layer is the paper's.

A layer that reads memory does so between its attention and the linear map behind it: one hook notes
the queries as projected (not rotated), another fuses the concatenated heads. So eager, SDPA and
flash attention serve alike, and no attention code is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memlayer.attention import fuse, memory_attention
from memlayer.capture import BackboneStates, first_tensor
from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from memlayer.config import LongMemConfig
    from memlayer.decoders import DecoderParts
    from memlayer.memory import MemoryReader


GENTLE_GATE = -1.5
"""Where gates start with ``side_init="identity"``: memory enters unscaled there, and half of the
attention (the paper's 0) is more than an untrained layer can use."""


class SideNetwork(nn.Module):
    """L / r decoder layers beside the backbone, some of which read memory.

    Args:
        parts: the backbone's parts; its layers and final norm are copied.
        config: with ``memory_layers`` set.

    Attributes:
        layers: side layers, copies of backbone layers.
        norm: trainable copy of the final norm.
        gates: one ``(H,)`` float32 parameter a memory layer, before the sigmoid.
        scales: ``(L_s,)`` float32, :math:`a_l`; None with ``side_init="backbone"``.
        boundaries: for each side layer, the last backbone layer (from 0) whose work it stands for.
        sources: for each side layer, the backbone layer that it is a copy of, and with whose
            arguments it is called.
        readers: for each memory layer, the side layer that reads it.
    """

    def __init__(self, parts: DecoderParts, config: LongMemConfig) -> None:
        super().__init__()
        self._parts = parts
        depth, reduction = len(parts.layers), config.layer_reduction_factor
        memory_layers = config.memory_layers or ()
        self.boundaries = tuple(
            min(start + reduction, depth) - 1 for start in range(0, depth, reduction)
        )
        self.readers = tuple(layer // reduction for layer in memory_layers)
        if len(set(self.readers)) < len(self.readers):
            raise ConfigError(
                f"memory_layers must be read by different side layers, got {list(memory_layers)} "
                f"with layer_reduction_factor={reduction}; take layers at least {reduction} apart"
            )
        # The layer that reads memory starts as the one that wrote it: queries and keys match.
        sources = list(self.boundaries)
        for reader, layer in zip(self.readers, memory_layers, strict=True):
            sources[reader] = layer
        self.sources = tuple(sources)
        self.layers = nn.ModuleList(
            _copy_layer(parts.layers[source], depth + number)
            for number, source in enumerate(sources)
        )
        self.norm = _copy_module(parts.final_norm)
        identity = config.side_init == "identity"
        gate = torch.full(
            (parts.num_attention_heads,), GENTLE_GATE if identity else 0.0, device=_device(parts)
        )
        self.gates = nn.ParameterList(gate.clone() for _ in memory_layers)
        self.scales: nn.Parameter | None = None
        if identity:
            self.scales = nn.Parameter(torch.zeros(len(sources), device=_device(parts)))
        self.memory_distance = config.memory_distance

    def forward(self, states: BackboneStates, memory: MemoryReader | None = None) -> Tensor:
        """Give the final hidden states, normed: ``(B, T, E)``.

        Args:
            states: of one backbone pass, with the outputs of ``boundaries`` and the calls of
                ``sources``.
            memory: what to read; None leaves memory attention out, and so does an empty memory.
        """
        dtype = next(self.layers.parameters()).dtype
        inner = [hidden.to(dtype) for hidden in states.hidden_states]
        hidden = inner[0]
        readers = {side: number for number, side in enumerate(self.readers)}
        for number, (layer, call) in enumerate(zip(self.layers, states.calls, strict=True)):
            changes: list[Tensor] = []
            with ExitStack() as hooks:
                if memory is not None and memory.is_readable and number in readers:
                    reading = self._reading(layer, readers[number], memory, changes)
                    hooks.enter_context(reading)
                output = first_tensor(layer(hidden, *call.args, **call.kwargs))
            if self.scales is not None:
                scale = self.scales[number].to(dtype)
                output = hidden + scale * (output - hidden)
                for change in changes:
                    output = output + (1 - scale) * change
            hidden = output + (inner[number + 1] - inner[number])
        normed: Tensor = self.norm(hidden)
        return normed

    def parameter_groups(
        self, *, learning_rate: float, gate_learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Sort all parameters for an optimizer.

        Returns:
            Three groups: matrices, with decay; vectors (norms, biases), without; gates and layer
            scales, with their own learning rate and without decay.
        """
        gates = [*self.gates, *([] if self.scales is None else [self.scales])]
        known = {id(parameter) for parameter in gates}
        weights = [weight for weight in self.parameters() if id(weight) not in known]
        matrices = [weight for weight in weights if weight.dim() > 1]
        vectors = [weight for weight in weights if weight.dim() <= 1]
        return [
            {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
            {"params": gates, "lr": gate_learning_rate, "weight_decay": 0.0},
        ]

    @contextmanager
    def _reading(
        self, layer: nn.Module, number: int, memory: MemoryReader, changes: list[Tensor]
    ) -> Iterator[None]:
        """Let one layer's attention read memory layer ``number`` while this is entered.

        What memory changes in the attention's output, ``(B, T, E)``, goes to ``changes``.
        """
        parts, gate = self._parts, self.gates[number]
        attention = parts.attention(layer)
        projection = parts.description.query
        queries: list[Tensor] = []

        def keep_queries(_: nn.Module, __: Any, output: Any) -> None:
            queries.append(projection.split_heads(first_tensor(output), parts.head_dim))

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            query = queries.pop()
            retrieved = memory.retrieve(query, layer=number)
            recalled = memory_attention(self.rotate(query), retrieved, parts.scaling(attention))
            # (B, T, H * D) <-> (B, H, T, D)
            local = args[0].unflatten(2, (parts.num_attention_heads, -1)).transpose(1, 2)
            fused = fuse(local, recalled.to(local.dtype), gate, retrieved.found.any(dim=-1))
            joined = fused.transpose(1, 2).flatten(2)
            if self.scales is not None:
                # Its own forward, without hooks; less its bias, the map is linear.
                difference = joined - args[0]
                none = torch.zeros_like(difference[:1, :1])
                changes.append(output_module.forward(difference) - output_module.forward(none))
            return (joined, *args[1:])

        query_module = attention.get_submodule(projection.module)
        output_module = attention.get_submodule(parts.description.attention_output)
        with (
            query_module.register_forward_hook(keep_queries),
            output_module.register_forward_pre_hook(read),
        ):
            yield

    def rotate(self, query: Tensor) -> Tensor:
        """Turn queries as if every retrieved key stood ``memory_distance`` tokens before them."""
        rotary = self._parts.rotary
        if self.memory_distance is None or rotary is None:
            return query
        position = torch.tensor([[self.memory_distance]], device=query.device)
        cos, sin = rotary(query, position)
        first, second = query.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return torch.addcmul(query * cos.unsqueeze(1), turned, sin.unsqueeze(1))


def _copy_layer(layer: nn.Module, layer_idx: int) -> nn.Module:
    """Copy a decoder layer as a trainable one with a place of its own in the KV cache."""
    copied = _copy_module(layer)
    for module in copied.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", layer_idx)  # noqa: B010 - nn.Module types its own attributes
    return copied


def _copy_module(module: nn.Module) -> nn.Module:
    # Configurations stay shared, so that a change of attention implementation reaches the copies.
    shared = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    copied = copy.deepcopy(module, shared)
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied.requires_grad_(True)


def _device(parts: DecoderParts) -> torch.device:
    return next(parts.layers.parameters()).device
