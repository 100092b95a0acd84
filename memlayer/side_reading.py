r"""How a side layer reads memory: between its attention and the linear map behind it.

One hook notes the queries as projected (not rotated), another fuses the concatenated heads with
what memory gave. So with gates eager, SDPA and flash attention serve alike, and no attention code
is copied. With ``fusion="softmax"`` the call of the attention itself is looked at, which has to be
SDPA's (`memlayer.local_attention`).

    queries, not rotated --> search --+--> memory attention --+--> share, fuse --> output projection
    queries as attention met them ----+                       |
    attention over the window --------------------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memlayer.attention import fuse, memory_attention, memory_share, recency_bias
from memlayer.capture import first_tensor
from memlayer.local_attention import AttentionWatch, other_attention
from memlayer.rotation import rotated

if TYPE_CHECKING:
    from torch import nn

    from memlayer.decoders import DecoderParts
    from memlayer.memory import MemoryReader, Retrieved

ReadingObserver = Callable[[int, Tensor, "Retrieved", Tensor], None]
"""Called with the memory layer (from 0), its queries ``(B, H, T, D)`` as they met the retrieved
keys, what was retrieved, and memory's share of each head's output ``(B, H, T)``."""


class MemoryReading:
    """What all layers that read memory have in common.

    Args:
        parts: the backbone's parts.
        one_softmax: whether window and memory share one softmax; else a gate mixes two.
        memory_distance: as in `LongMemConfig`.

    Attributes:
        observer: called with every reading; None for nobody.
    """

    def __init__(
        self, parts: DecoderParts, *, one_softmax: bool, memory_distance: int | None
    ) -> None:
        self._parts = parts
        self.one_softmax, self.memory_distance = one_softmax, memory_distance
        self.observer: ReadingObserver | None = None

    @contextmanager
    def of_layer(
        self,
        layer: nn.Module,
        number: int,
        memory: MemoryReader,
        *,
        gate: Tensor,
        slope: Tensor | None,
        scaling: float,
        found: list[Retrieved],
        changes: list[Tensor] | None,
    ) -> Iterator[None]:
        """Let one layer's attention read memory layer ``number`` while this is entered.

        Args:
            layer: a side layer.
            number: of the memory layer, from 0.
            memory: what to read.
            gate: ``(H,)``, float32; with one softmax a bias on the scores of what was retrieved.
            slope: ``(H,)``, float32, of `recency_bias`; None without one.
            scaling: factor on ``q . k`` of the memory attention.
            found: gets what was retrieved, which is taken from there if it is there already.
            changes: gets what memory changes in the attention's output, ``(B, T, E)``; None if
                nobody asks.
        """
        parts, attention = self._parts, self._parts.attention(layer)
        projection = parts.description.query
        queries: list[Tensor] = []
        watch = AttentionWatch() if self.one_softmax else None

        def keep_queries(_: nn.Module, __: Any, output: Any) -> None:
            heads = projection.heads_of(attention, first_tensor(output), parts.head_dim)
            queries.append(heads)

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            query = queries.pop()
            if not found:
                found.append(memory.retrieve(query, layer=number))
            retrieved = found[0]
            bias = None if slope is None else recency_bias(slope, retrieved)
            met, recalled, advantage = self._attend(query, retrieved, scaling, bias, watch)
            share = memory_share(gate, retrieved.found.any(dim=-1), advantage)
            if self.observer is not None:
                self.observer(number, met, retrieved, share)
            # (B, T, H * D) <-> (B, H, T, D)
            local = args[0].unflatten(2, (parts.num_attention_heads, -1)).transpose(1, 2)
            joined = fuse(local, recalled.to(local.dtype), share).transpose(1, 2).flatten(2)
            if changes is not None:
                # Its own forward, without hooks; less its bias, the map is linear.
                difference = joined - args[0]
                none = torch.zeros_like(difference[:1, :1])
                changes.append(output_module.forward(difference) - output_module.forward(none))
            return (joined, *args[1:])

        query_module = attention.get_submodule(projection.module)
        output_module = attention.get_submodule(parts.description.attention_output)
        with (
            nullcontext() if watch is None else watch,
            query_module.register_forward_hook(keep_queries),
            output_module.register_forward_pre_hook(read),
        ):
            yield

    def _attend(
        self,
        query: Tensor,
        retrieved: Retrieved,
        scaling: float,
        bias: Tensor | None,
        watch: AttentionWatch | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give the queries as they met memory, what they read, and its advantage in one softmax."""
        if watch is None:
            met = self.rotate(query)
            recalled, _ = memory_attention(met, retrieved, scaling, bias)
            return met, recalled, None
        if watch.call is None:
            raise other_attention(self._parts.decoder.config)
        if self.memory_distance is None:
            # Kept keys are not rotated, so that they stand at position 0: where the window begins.
            # Some families (OPT) scale their queries themselves; of a single token, heads that
            # share a key come packed as if they were tokens.
            met = (watch.call.query * (watch.call.scaling / scaling)).reshape(query.shape)
        else:
            met = self.rotate(query)
        recalled, log_mass = memory_attention(met, retrieved, scaling, bias)
        return met, recalled, log_mass - watch.call.log_mass().reshape(log_mass.shape)

    def rotate(self, query: Tensor) -> Tensor:
        """Turn queries as if every retrieved key stood ``memory_distance`` tokens before them."""
        rotary = self._parts.rotary
        if self.memory_distance is None or rotary is None:
            return query
        position = torch.tensor([[self.memory_distance]], device=query.device)
        return rotated(query, *rotary(query, position))
