r"""The side network: the trainable layers that read what the backbone wrote.

Each side layer is a copy of a backbone layer, run by that layer's own code with the very arguments
(mask, positions, cache) that the backbone's layer was called with:

.. math:: s^0 = h^0, \qquad s^l = f_l(s^{l-1}) + (h^{rl} - h^{r(l-1)})

with :math:`h` the residual stream before any final norm. So layer :math:`rl` counts twice, once in
:math:`f_l` and once in the residual. With ``side_init="replace"`` (the default) it counts once: the
side layer takes the place of backbone layer :math:`c_l` (from 0), the one that it is a copy of, and
only the work of the layers it has no copy of is added,

.. math:: s^l = f_l\bigl(s^{l-1} + (h^{c_l} - h^{r(l-1)})\bigr) + (h^{rl} - h^{c_l + 1})

so that without memory the untrained network is the backbone, and what memory changes in one layer
runs through all side layers above it. With ``side_init="identity"``,

.. math:: s^l = s^{l-1} + a_l (f_l(s^{l-1}) - s^{l-1}) + (1 - a_l) m_l + (h^{rl} - h^{r(l-1)})

where :math:`a_l` starts at 0, and :math:`m_l = W_o\, \sigma(g) (M - A)` is what memory changes in
the output of the layer's attention (0 in layers that read none): the backbone at the start, too,
but what memory changes passes by the layers above until their :math:`a` has grown.

With ``coupled=True`` there is no network beside the backbone: from the first memory layer on, its
layers run once more, those that read memory as trainable copies and the others as they are,

.. math:: s^l = f_l(s^{l-1}), \qquad s^{m-1} = h^{m-1}

With ``side_rank`` set, side layers run the backbone's own weights and only low-rank updates of
their linear maps train (`memlayer.low_rank`).

How a layer reads memory is in `memlayer.side_reading`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memlayer.capture import BackboneStates, LayerCall, first_tensor
from memlayer.dispatch import execution_device
from memlayer.errors import ConfigError
from memlayer.low_rank import add_updates
from memlayer.side_layers import (
    copy_layer,
    copy_module,
    layer_numbers,
    twin_layer,
    weights_dtype,
)
from memlayer.side_reading import MemoryReading

if TYPE_CHECKING:
    from memlayer.config import LongMemConfig
    from memlayer.decoders import DecoderParts
    from memlayer.memory import MemoryReader, Retrieved


GENTLE_GATE = -2.0
"""Where gates start, unless with ``side_init="backbone"``: half of the attention (the paper's 0) is
more than an untrained layer can use."""

GENTLE_BIAS = -1.0
"""Where they start with ``fusion="softmax"``, measured in docs/results.md."""


class SideNetwork(nn.Module):
    """L / r decoder layers beside the backbone, some of which read memory.

    Args:
        parts: the backbone's parts; its layers and final norm are copied.
        config: with ``memory_layers`` set.

    Attributes:
        layers: what trains of the side layers: copies of backbone layers, or updates of them.
        in_order: the side layers as they are run, in order; if coupled with the others as they are.
        norm: trainable copy of the final norm; None if coupled.
        gates: one ``(H,)`` float32 parameter a memory layer, before the sigmoid.
        slopes: one ``(H,)`` float32 parameter a memory layer, of `recency_bias`; None without
            ``recency_bias``.
        scales: ``(L_s,)`` float32, :math:`a_l`; None unless with ``side_init="identity"``.
        coupled: whether only the layers that read memory are trained.
        twins: the side layers that run the backbone's own weights, and in its precision.
        replaces: whether side layers take the place of the layers that they are copies of.
        boundaries: for each side layer, the last backbone layer (from 0) whose work it stands for.
        sources: for each side layer, the backbone layer that it is a copy of, and with whose
            arguments it is called.
        readers: for each memory layer, the side layer that reads it.
        outputs: the backbone layers, rising, whose outputs `forward` needs.
        reading: how a layer reads memory.
        gradient_checkpointing: whether training keeps only each layer's input and runs the layer
            again in the backward pass. Memory is searched once all the same.
    """

    def __init__(self, parts: DecoderParts, config: LongMemConfig) -> None:
        super().__init__()
        self._parts = parts
        depth, reduction = len(parts.layers), config.layer_reduction_factor
        memory_layers = config.memory_layers or ()
        first = memory_layers[0] if config.coupled else 0
        self.boundaries = tuple(
            min(start + reduction, depth) - 1 for start in range(first, depth, reduction)
        )
        self.readers = tuple(layer // reduction - first for layer in memory_layers)
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
        numbered, dtype = layer_numbers(parts.layers), weights_dtype(parts)
        device = execution_device(parts.decoder)
        rank = config.side_rank
        wide = torch.promote_types(dtype, torch.float32)
        trained = set(self.readers) if config.coupled else set(range(len(sources)))
        self.twins = frozenset(
            number for number in range(len(sources)) if rank or number not in trained
        )
        # Not a ModuleList: a twin's weights are the backbone's.
        self.in_order = tuple(
            twin_layer(parts.layers[source], numbered, depth + number)
            if number in self.twins
            else copy_layer(parts.layers[source], numbered, depth + number, dtype)
            for number, source in enumerate(sources)
        )
        self.layers = nn.ModuleList(
            layer if rank is None else add_updates(layer, rank, seed=number).to(wide)
            for number, layer in enumerate(self.in_order)
            if number in trained
        )
        self.norm = None if config.coupled else copy_module(parts.final_norm, dtype)
        self.coupled = config.coupled
        self.replaces = config.side_init == "replace"
        needed = set(self.boundaries)
        if self.replaces:
            needed.update(sources, (source - 1 for source in sources if source))
        self.outputs = tuple(sorted(needed))
        self.reading = MemoryReading(
            parts,
            one_softmax=config.fusion == "softmax",
            memory_distance=config.memory_distance,
        )
        first_gate = GENTLE_BIAS if self.reading.one_softmax else GENTLE_GATE
        if config.side_init == "backbone":
            first_gate = 0.0
        gate = torch.full((parts.num_attention_heads,), first_gate, device=device)
        self.gates = nn.ParameterList(gate.clone() for _ in memory_layers)
        self.slopes: nn.ParameterList | None = None
        if config.recency_bias:
            self.slopes = nn.ParameterList(torch.zeros_like(gate) for _ in memory_layers)
        self.scales: nn.Parameter | None = None
        if config.side_init == "identity":
            self.scales = nn.Parameter(torch.zeros(len(sources), device=device))
        self.to(device)  # layers of a backbone on several devices are copied to one
        self.gradient_checkpointing = False
        self.normed_residual = config.normed_residual

    def forward(self, states: BackboneStates, memory: MemoryReader | None = None) -> Tensor:
        """Give the final hidden states, normed: ``(B, T, E)``.

        Args:
            states: of one backbone pass, with what ``outputs`` names and the calls of ``sources``.
            memory: what to read; None leaves memory attention out, and so does an empty memory.
        """
        dtype = next(self.layers.parameters()).dtype
        # The backbone's residual stream above a layer; -1: the embeddings.
        above = {
            layer: hidden.to(dtype)
            for layer, hidden in zip((-1, *self.outputs), states.hidden_states, strict=True)
        }
        if self.normed_residual:
            end = self.boundaries[-1]
            above[end] = self._parts.final_norm(states.hidden_states[-1]).to(dtype)
        # A cache would be given the same tokens twice.
        recompute = (
            self.gradient_checkpointing
            and self.training
            and torch.is_grad_enabled()
            and states.past_key_values is None
        )
        covered = self.sources[0] - 1 if self.coupled else -1
        hidden = above[covered]
        for number, (boundary, source) in enumerate(
            zip(self.boundaries, self.sources, strict=True)
        ):
            call = states.calls[number]
            if self.replaces:
                reached = hidden + (above[source - 1] - above[covered])
                output, _ = self._run(number, reached, call, memory, recompute)
                hidden = output + (above[boundary] - above[source])
            else:
                output, changes = self._run(number, hidden, call, memory, recompute)
                if self.scales is not None:
                    scale = self.scales[number].to(dtype)
                    output = hidden + scale * (output - hidden)
                    for change in changes:
                        output = output + (1 - scale) * change
                hidden = output + (above[boundary] - above[covered])
            covered = boundary
        if self.norm is None:
            hidden, norm = hidden.to(weights_dtype(self._parts)), self._parts.final_norm
        else:
            norm = self.norm
        normed: Tensor = norm(hidden)
        return normed

    def _run(
        self,
        number: int,
        hidden: Tensor,
        call: LayerCall,
        memory: MemoryReader | None,
        recompute: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run one side layer; give its output and what memory changed in its attention's."""
        layer = self.in_order[number]
        dtype = weights_dtype(self._parts) if number in self.twins else hidden.dtype
        reads = memory is not None and memory.is_readable and number in self.readers
        # By the backward pass memory may hold this very segment: what was found is kept.
        found: list[Retrieved] = []

        def run(hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
            changes: list[Tensor] = []
            reading: AbstractContextManager[None] = nullcontext()
            if reads:
                assert memory is not None
                reader = self.readers.index(number)
                reading = self.reading.of_layer(
                    layer,
                    reader,
                    memory,
                    gate=self.gates[reader],
                    slope=None if self.slopes is None else self.slopes[reader],
                    scaling=self.scaling(reader),
                    found=found,
                    changes=None if self.scales is None else changes,
                )
            with reading:
                output = first_tensor(layer(hidden.to(dtype), *call.args, **call.kwargs))
            return output.to(hidden.dtype), changes

        if recompute:
            again: tuple[Tensor, list[Tensor]] = checkpoint(run, hidden, use_reentrant=False)
            return again
        return run(hidden)

    @property
    def mixing_parameters(self) -> list[nn.Parameter]:
        """Gates, slopes and layer scales: single numbers, in no module that is ever called."""
        scales = [] if self.scales is None else [self.scales]
        return [*self.gates, *(self.slopes or ()), *scales]

    def parameter_groups(
        self, *, learning_rate: float, gate_learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Sort all parameters for an optimizer.

        Returns:
            Three groups: matrices, with decay; vectors (norms, biases), without; gates,
            slopes and layer scales, with their own learning rate and without decay.
        """
        gates = self.mixing_parameters
        known = {id(parameter) for parameter in gates}
        weights = [weight for weight in self.parameters() if id(weight) not in known]
        matrices = [weight for weight in weights if weight.dim() > 1]
        vectors = [weight for weight in weights if weight.dim() <= 1]
        return [
            {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
            {"params": gates, "lr": gate_learning_rate, "weight_decay": 0.0},
        ]

    def scaling(self, number: int) -> float:
        """Give the factor on ``q . k`` before the softmax of memory layer ``number``."""
        return self._parts.scalings[self.sources[self.readers[number]]]
