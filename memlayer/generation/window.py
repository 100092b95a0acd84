"""The local window of text that is being generated, and what left it: one Hugging Face cache.

    tokens of a sequence   0 ........................ start ............... seen
                           in the scratch memory, in    in the window: ids, mask,
                           segments of half a window    keys and values of both networks

Where the window starts depends on the number of tokens alone: as soon as there are more than a
window's, its oldest half leaves, so that a long prompt and the same text generated token by token
stand in the same state. A row's padding never counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from torch import LongTensor
    from transformers import PreTrainedConfig

    from memlayer.memory.scratch import ScratchMemory


class WindowCache(Cache):
    """What `LongMemModel.generate` hands on from step to step, as ``past_key_values``.

    Args:
        config: the backbone's.
        length: W, tokens of a full window.
        step: tokens that leave it at a time, at most W - 1.
        rows: prompts; each may have several sequences (beams).

    Attributes:
        local: keys and values of the window's tokens, backbone and side network.
        ids: ``(S, w)``, int64. The window's tokens, each row's last in the last column.
        mask: ``(S, w)``, bool. False for padding.
        seen: columns given so far, padding included: what Hugging Face takes for the length.
        scratch: what left the window; None until something has.
    """

    def __init__(self, config: PreTrainedConfig, *, length: int, step: int, rows: int) -> None:
        self._config = config
        self.length = length
        self.step = step
        self.rows = rows
        self.local = DynamicCache(config=config)
        super().__init__(layers=self.local.layers)
        self.ids: Tensor = torch.empty(0, 0, dtype=torch.int64)
        self.mask: Tensor = torch.empty(0, 0, dtype=torch.bool)
        self.seen = 0
        self.scratch: ScratchMemory | None = None
        # At least the tokens of the row with most of them.
        self._longest = 0

    # ---------------------------------------------------------------- what Hugging Face calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the columns that were given so far, those that left the window included."""
        return self.seen

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Let each sequence go on from another one's past, of the same prompt."""
        if self.scratch is not None:
            self.scratch.reorder(beam_idx)
        self.local.reorder_cache(beam_idx)
        chosen = beam_idx.to(self.ids.device)
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what left the window cannot come back.

        Raises:
            ConfigError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise ConfigError(
                f"the last {abs(tokens_to_remove)} tokens cannot be taken back once memory has "
                "been read for them; assisted generation needs disable_adapter()"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to grow: give the final batch from the beginning.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"a cache made by generate() cannot be repeated ({repeats} times); pass "
            "num_return_sequences to generate()"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse to leave out sequences.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"sequences cannot be taken out of a cache made by generate(), got {indices.tolist()}"
        )

    def reset(self) -> None:
        """Forget everything, the scratch memory too."""
        self.__init__(  # type: ignore[misc]
            self._config, length=self.length, step=self.step, rows=self.rows
        )

    # ---------------------------------------------------------------- tokens

    @property
    def sequences(self) -> int:
        """S, the sequences held; 0 before the first call."""
        return len(self.ids)

    @property
    def expand(self) -> int:
        """Sequences of each prompt."""
        return max(self.sequences // self.rows, 1)

    def append(self, ids: Tensor, mask: Tensor) -> None:
        """Note new tokens of the window, ``(S, n)`` both."""
        self._longest += ids.shape[1]
        if self.sequences == 0:
            self.ids, self.mask = ids, mask
        else:
            self.ids = torch.cat([self.ids, ids], dim=1)
            self.mask = torch.cat([self.mask, mask], dim=1)

    def leaving(self, mask: Tensor) -> Tensor | None:
        """Say how many of each row's oldest tokens leave when tokens ``(S, n)`` come.

        Returns:
            ``(S,)``, int64, multiples of ``step``; None where none do.
        """
        # An upper bound, so that most steps need not look at the mask.
        if self._longest + mask.shape[1] <= self.length:
            return None
        counts = mask.sum(dim=1)
        if self.sequences:
            counts = counts + self.mask.sum(dim=1)
        steps = -(-(counts - self.length).clamp(min=0) // self.step)
        leaving = steps * self.step
        return leaving if bool(leaving.any()) else None

    # ---------------------------------------------------------------- replacing rows

    def hide_rows(self, rows: Tensor) -> None:
        """Take the tokens of some rows ``(b,)`` out of the window."""
        self.mask = self.mask.index_fill(0, rows, False)

    def replace_rows(self, rows: Tensor, ids: Tensor, mask: Tensor, local: DynamicCache) -> None:
        """Put windows that were computed anew in the place of hidden rows' old ones.

        Args:
            rows: ``(b,)``, int64.
            ids: ``(b, w')``, int64, ``w'`` at most the window's columns now.
            mask: ``(b, w')``, bool, False on the left of a shorter row.
            local: keys and values of those windows.
        """
        place = self.ids.shape[1] - ids.shape[1]
        self.ids, self.mask = self.ids.clone(), self.mask.clone()
        self.ids[rows, place:], self.mask[rows, place:] = ids, mask
        for held, new in zip(_layers(self.local), _layers(local), strict=True):
            # A sliding layer keeps fewer columns; both end with the same one.
            stored = min(held.keys.shape[2], new.keys.shape[2])
            held.keys[rows, :, held.keys.shape[2] - stored :] = _last(new.keys, stored)
            held.values[rows, :, held.values.shape[2] - stored :] = _last(new.values, stored)

    def drop_empty_columns(self) -> None:
        """Cut off the columns on the left that are padding in every row."""
        filled = self.mask.any(dim=0)
        if not bool(filled.any()):
            self._longest = 0
            self.local = DynamicCache(config=self._config)
            self.layers = self.local.layers
            self.ids, self.mask = self.ids[:, :0], self.mask[:, :0]
            return
        self._longest = int(self.mask.sum(dim=1).max())
        first = int(filled.long().argmax())
        self.ids, self.mask = self.ids[:, first:].clone(), self.mask[:, first:].clone()
        width = self.ids.shape[1]
        for layer in _layers(self.local):
            kept = width
            if isinstance(layer, DynamicSlidingWindowLayer):  # it counts its columns itself
                layer.cumulative_length = width
                kept = min(width, layer.sliding_window - 1)
            # Copies: a view would keep the longer tensor alive.
            layer.keys, layer.values = _last(layer.keys, kept), _last(layer.values, kept)


def _layers(cache: DynamicCache) -> Sequence[Any]:
    """Give the layers of a filled cache: dynamic ones, sliding or not (see `with_side_layers`)."""
    return cache.layers


def _last(states: Tensor, count: int) -> Tensor:
    return states[:, :, states.shape[2] - count :].clone()


def packed_right(ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Move the kept tokens of every row to its end.

    Args:
        ids: ``(S, n)``, int64.
        kept: ``(S, n)``, bool.

    Returns:
        Ids and mask, ``(S, w)``, with w the most tokens that a row keeps; ids are 0 on the left of
        a shorter row.
    """
    width = int(kept.sum(dim=1).max()) if kept.numel() else 0
    order = torch.argsort(kept.long(), dim=1, stable=True)[:, kept.shape[1] - width :]
    mask = kept.gather(1, order)
    return ids.gather(1, order).masked_fill(~mask, 0), mask
