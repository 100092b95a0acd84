"""What left the local window while text is being generated: a memory that several sequences share.

All sequences of one prompt (its beams, its returned sequences) read one group of chunks, and each
sees those of its own past only. A segment that several of them have in common is stored once; to
reorder beams only moves what each may see. So beams share whatever they share, and nothing is
copied until they write different text.

    append:   segments (U, H_kv, n, D), which sequences each belongs to ─► group of chunks, visible
    retrieve: (S, H, T, D) ─► scores over the group, others' chunks masked ─► places

Search is exact and by plain products: what is generated is small beside what was memorized, and no
index could hide one beam's chunks from another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memlayer.errors import ConfigError
from memlayer.memory.retrieved import Retrieved

_BLOCK_BYTES = 32 * 2**20


class ScratchMemory:
    """A FIFO memory for each of S sequences, in groups that share storage.

    Args:
        groups: G, prompts.
        sequences: S, a multiple of G: sequence ``s`` belongs to group ``s // (S / G)``.
        capacity: tokens that each sequence sees at most, its newest; a multiple of ``chunk_size``.
        chunk_size: C.
        top_k: K, tokens found per query, a multiple of ``chunk_size``.
        num_layers: memory layers.
        num_key_value_heads: H_kv.
        head_dim: D.
        dtype: of stored keys and values; chunk keys are float32.
        device: where everything lies.
    """

    def __init__(
        self,
        *,
        groups: int,
        sequences: int,
        capacity: int,
        chunk_size: int,
        top_k: int,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups = groups
        self.sequences = sequences
        self.capacity = capacity
        self.chunk_size = chunk_size
        self.top_k = top_k
        shape = (num_layers, groups, num_key_value_heads, 0)
        self._keys = torch.empty(*shape, chunk_size, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        self._chunk_keys = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
        # Chunks ever appended to the group before this one; rises along a group's slots.
        self._numbers = torch.empty(groups, 0, dtype=torch.int64, device=device)
        self._visible = torch.empty(sequences, 0, dtype=torch.bool, device=device)
        # Chunks ever written for a sequence, along its own past.
        self._written = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._used = torch.zeros(groups, dtype=torch.int64)
        self._appended = torch.zeros(groups, dtype=torch.int64)

    @property
    def expand(self) -> int:
        """Sequences of each group."""
        return self.sequences // self.groups

    @property
    def is_readable(self) -> bool:
        """Whether any sequence sees a chunk."""
        return bool(self._used.any())

    @property
    def stored_chunks(self) -> int:
        """Chunks of the fullest group, whichever of its sequences sees them."""
        return int(self._used.max())

    @property
    def allocated_chunks(self) -> int:
        """Chunks of each group for which there is room now."""
        return self._keys.shape[3]

    def lengths(self) -> Tensor:
        """Count the tokens that each sequence sees: ``(S,)``, int64."""
        return self._visible.sum(dim=1) * self.chunk_size

    # ---------------------------------------------------------------- writing

    @torch.no_grad()
    def append(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        sequences: Tensor,
        segment_of: Tensor,
    ) -> None:
        """Append one segment to some sequences.

        Args:
            keys: ``(U, H_kv, n, D)``, one tensor a memory layer; n a multiple of ``chunk_size``.
            values: likewise.
            sequences: ``(R,)``, int64. The sequences that get a segment, each once.
            segment_of: ``(R,)``, int64. Which of the U segments each gets. Sequences of one group
                may have one in common, those of different groups not.
        """
        new_keys, new_values = (
            torch.stack(list(layers)).unflatten(3, (-1, self.chunk_size))
            for layers in (keys, values)
        )
        chunks = new_keys.shape[3]
        group = torch.empty(new_keys.shape[1], dtype=torch.int64)
        group[segment_of.cpu()] = sequences.cpu() // self.expand
        # The place of a segment among those of its group.
        earlier = torch.tril(group.unsqueeze(1) == group, diagonal=-1).sum(dim=1)
        counts = torch.bincount(group, minlength=self.groups) * chunks
        self._make_room(counts)
        slots = (self._used[group] + earlier * chunks).unsqueeze(1) + torch.arange(chunks)
        numbers = (self._appended[group] + earlier * chunks).unsqueeze(1) + torch.arange(chunks)
        self._used += counts
        self._appended += counts
        slots, numbers, group = (
            index.to(self._keys.device) for index in (slots, numbers, group.unsqueeze(1))
        )
        # Index arrays apart from each other put their axes first: (U, n, layers, H_kv, ...).
        self._keys[:, group, :, slots] = new_keys.permute(1, 3, 0, 2, 4, 5).to(self._keys.dtype)
        self._values[:, group, :, slots] = new_values.permute(1, 3, 0, 2, 4, 5).to(
            self._values.dtype
        )
        means = new_keys.float().mean(dim=-2)
        self._chunk_keys[:, group, :, slots] = means.permute(1, 3, 0, 2, 4)
        self._numbers[group, slots] = numbers
        self._visible[sequences.unsqueeze(1), slots[segment_of]] = True
        self._written[sequences] += chunks
        self._hide_oldest()

    def _hide_oldest(self) -> None:
        """Let each sequence see its newest chunks only, ``capacity`` tokens of them."""
        most = self.capacity // self.chunk_size
        order = self._visible.long().cumsum(dim=1)
        self._visible &= order > order[:, -1:] - most

    def _make_room(self, counts: Tensor) -> None:
        needed = int((self._used + counts).max())
        slots = self._keys.shape[3]
        if needed <= slots:
            return
        # Chunks that no sequence sees any more make room first: other beams won.
        kept = self._visible.view(self.groups, self.expand, slots).any(dim=1)
        self._used = kept.sum(dim=1).cpu()
        needed = int((self._used + counts).max())
        room = max(needed + needed // 4, min(slots, 2 * needed))
        # The kept slots of every group first and in order, whatever else behind them.
        order = torch.argsort(~kept, dim=1, stable=True)[:, : int(self._used.max())]
        self._keys, self._values, self._chunk_keys = (
            _regrouped(stored, order, room)
            for stored in (self._keys, self._values, self._chunk_keys)
        )
        self._numbers = _longer(self._numbers.gather(1, order), room)
        order = order.repeat_interleave(self.expand, dim=0)
        self._visible = _longer(self._visible.gather(1, order), room)

    # ---------------------------------------------------------------- reading

    @torch.no_grad()
    def retrieve(self, queries: Tensor, *, layer: int) -> Retrieved:
        """Find the chunks for each query, in its own sequence's past.

        Args:
            queries: ``(S, H, T, D)``, not rotated, not scaled.
            layer: which memory layer, counted from 0.
        """
        _, heads, tokens, head_dim = queries.shape
        used = int(self._used.max())
        key_value_heads = self._keys.shape[2]
        beams, query_group = self.expand, heads // key_value_heads
        # (S, H, T, D) -> (G, H_kv, beams, H / H_kv, T, D): one lane a group and key/value head.
        split = queries.float().reshape(
            self.groups, beams, key_value_heads, query_group, tokens, head_dim
        )
        lanes = split.transpose(1, 2)
        chunk_keys = self._chunk_keys[layer, :, :, :used].flatten(0, 1).transpose(1, 2)
        hidden = ~self._visible[:, :used].view(self.groups, 1, beams, 1, 1, used)
        chunks = self.top_k // self.chunk_size
        found = min(chunks, used)
        scores = lanes.new_full((*lanes.shape[:-1], chunks), -torch.inf)
        slots = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
        per_token = 4 * used * lanes[..., 0, 0].numel()
        block = max(1, _BLOCK_BYTES // per_token)
        for start in range(0, tokens, block):
            part = lanes[:, :, :, :, start : start + block]
            products = torch.bmm(part.flatten(0, 1).flatten(1, 3), chunk_keys)
            products = products.view(*part.shape[:-1], used).masked_fill(hidden, -torch.inf)
            best, where = products.topk(found, dim=-1)
            scores[:, :, :, :, start : start + block, :found] = best
            slots[:, :, :, :, start : start + block, :found] = where

        def as_queries(result: Tensor) -> Tensor:
            return result.transpose(1, 2).reshape(self.sequences, heads, tokens, chunks)

        lane = torch.arange(self.groups * key_value_heads, device=slots.device)
        lane = lane.view(self.groups, key_value_heads, 1, 1, 1, 1)
        numbers = self._numbers.view(self.groups, 1, 1, 1, 1, -1).expand(*slots.shape[:-1], -1)
        ids = numbers.gather(-1, slots).masked_fill(scores == -torch.inf, -1)
        newer = self._visible[:, :used].long().cumsum(dim=1)
        newer = (newer[:, -1:] - newer).view(self.groups, 1, beams, 1, 1, used)
        ages = newer.expand(*slots.shape[:-1], -1).gather(-1, slots)
        keys = self._keys
        return Retrieved(
            ids=as_queries(ids),
            scores=as_queries(scores),
            found=as_queries(ids >= 0),
            ages=as_queries(ages),
            written=self._written.clone(),
            places=as_queries(lane * keys.shape[3] + slots),
            keys=(keys[layer].flatten(0, 2),),
            values=(self._values[layer].flatten(0, 2),),
            # Nothing is ever overwritten: storage is filled, or replaced by other storage.
            intact=lambda: True,
        )

    # ---------------------------------------------------------------- sequences

    def reorder(self, chosen: Tensor) -> None:
        """Let sequence ``s`` go on from the past of sequence ``chosen[s]`` of the same group.

        Args:
            chosen: ``(S,)``, int64.

        Raises:
            ConfigError: if that one belongs to another prompt.
        """
        own = torch.arange(self.sequences, device=chosen.device) // self.expand
        if len(chosen) != self.sequences or not torch.equal(chosen // self.expand, own):
            raise ConfigError(
                f"sequences may be reordered among those of one prompt only ({self.expand} "
                f"each), got {chosen.tolist()}"
            )
        chosen = chosen.to(self._visible.device)
        self._visible, self._written = self._visible[chosen], self._written[chosen]


def _regrouped(stored: Tensor, order: Tensor, slots: int) -> Tensor:
    """Take each group's slots in an order: ``(layers, G, H_kv, old, ...)`` by ``(G, n)``."""
    groups = torch.arange(len(order), device=stored.device).unsqueeze(1)
    # Zeros: a slot that holds no chunk is read too, with weight 0, and must be finite.
    taken = stored.new_zeros(*stored.shape[:3], slots, *stored.shape[4:])
    # (G, n, layers, H_kv, ...), as index arrays that are apart give it.
    taken[:, :, :, : order.shape[1]] = stored[:, groups, :, order].movedim((0, 1), (1, 3))
    return taken


def _longer(held: Tensor, slots: int) -> Tensor:
    grown = held.new_zeros(held.shape[0], slots)
    grown[:, : held.shape[1]] = held
    return grown
