"""One step of generation: new tokens come, the window's oldest go to memory, the rest is read.

    new tokens ─► do more than a window's tokens stand there?
                   yes: the oldest half ─► backbone to the memory layers ─► scratch memory
                        what stays ─► computed anew, as a window of its own
                 ─► encode behind the window ─► read the bank and the scratch memory

So at every step the logits are those of one forward over the window, with everything before it in
memory. Computing what stays costs one token of prefill for each token of decoding, and means that
nothing depends on how the text came: at once or token by token, alone or in a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from memlayer.capture import BackboneStates, run_to_memory_layers
from memlayer.errors import ConfigError
from memlayer.generation.window import WindowCache, packed_right
from memlayer.inputs import decoder_inputs
from memlayer.memory import BankReader, MemoryBank, MemoryReader, SelectedRows, StackedReader
from memlayer.memory.scratch import ScratchMemory

if TYPE_CHECKING:
    from memlayer.model import LongMemModel


def new_window(model: LongMemModel, rows: int) -> WindowCache:
    """Make an empty window for a number of prompts.

    It holds ``segment_length`` tokens, or as many as the backbone has learned positions for.

    Raises:
        ConfigError: if a chunk does not fit in half of it.
    """
    config, most = model.memory_config, model.parts.max_positions
    length = config.segment_length if most is None else min(config.segment_length, most)
    step = max(length // 2 // config.chunk_size, 1) * config.chunk_size
    if step >= length:
        raise ConfigError(
            f"generate() needs a window longer than chunk_size={config.chunk_size} tokens, got "
            f"{length}; set a larger segment_length or a smaller chunk_size"
        )
    return WindowCache(model.config, length=length, step=step, rows=rows)


def advance(
    model: LongMemModel,
    cache: WindowCache,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    memory: MemoryBank | None,
    logits_to_keep: int | Tensor = 1,
) -> tuple[BackboneStates, MemoryReader | None]:
    """Take the next tokens into the window and run the backbone over them.

    Args:
        model: whose backbone runs.
        cache: changed in place.
        input_ids: ``(S, n)``, int64. S sequences, the ones of a prompt side by side.
        attention_mask: ``(S, columns)``, 0 for padding; its last n columns are looked at.
        memory: what is read beside the scratch memory; None: no memory at all, and what leaves the
            window is forgotten.
        logits_to_keep: the positions that logits are wanted for, as forward has it.

    Returns:
        The states of the tokens that stayed in the window, each row's last one in the last column;
        and what the side network is to read.

    Raises:
        ConfigError: if the batch is not the cache's, or logits are wanted for tokens that leave.
    """
    _check_batch(cache, input_ids)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        mask = attention_mask[:, -input_ids.shape[1] :].bool()
    leaving = cache.leaving(mask)
    if leaving is not None:
        _check_kept(cache, mask, leaving, logits_to_keep)
    cache.seen += input_ids.shape[1]
    if leaving is not None:
        input_ids, mask = _overflow(model, cache, input_ids, mask, leaving, memory)
    cache.append(input_ids, mask)
    states = model.encode(
        input_ids, attention_mask=_unless_full(cache.mask), past_key_values=cache.local
    )
    return states, _reader(cache, memory)


def _overflow(
    model: LongMemModel,
    cache: WindowCache,
    input_ids: Tensor,
    mask: Tensor,
    leaving: Tensor,
    memory: MemoryBank | None,
) -> tuple[Tensor, Tensor]:
    """Let each row's oldest tokens leave; give the new ones that stay, and their mask."""
    ids, real = input_ids, mask
    if cache.sequences:
        ids, real = torch.cat([cache.ids, ids], dim=1), torch.cat([cache.mask, real], dim=1)
    rank = real.cumsum(dim=1) - 1
    if memory is not None:
        if cache.scratch is None:
            cache.scratch = _new_scratch(model, cache, len(ids))
        for first in range(0, int(leaving.max()), cache.step):
            rows = (leaving > first).nonzero().flatten()
            inside = (real & (rank >= first) & (rank < first + cache.step))[rows]
            _remember(model, cache.scratch, ids[rows][inside].view(len(rows), -1), rows)
    kept = real & (rank >= leaving.unsqueeze(1))
    old = ids.shape[1] - input_ids.shape[1]
    if old:
        moved = leaving.nonzero().flatten()
        cache.hide_rows(moved)
        # A row of which nothing old stays has nothing to compute.
        rows = moved[kept[moved, :old].any(dim=1)]
        if len(rows):
            window, window_mask = packed_right(ids[rows, :old], kept[rows, :old])
            local = DynamicCache(config=model.config)
            states = model.encode(
                window, attention_mask=_unless_full(window_mask), past_key_values=local
            )
            reader = _reader(cache, memory)
            if reader is not None and len(rows) < len(ids):
                reader = SelectedRows(reader, rows, len(ids))
            model.side_network(states, reader)
            cache.replace_rows(rows, window, window_mask, local)
        cache.drop_empty_columns()
    return packed_right(input_ids, kept[:, old:])


def _remember(model: LongMemModel, scratch: ScratchMemory, segments: Tensor, rows: Tensor) -> None:
    """Store one segment of each of some sequences: ``(R, n)`` of ``(R,)``; each once."""
    prompt = (rows // scratch.expand).unsqueeze(1)
    unique, segment_of = torch.unique(
        torch.cat([prompt, segments], dim=1), dim=0, return_inverse=True
    )
    inputs, _ = decoder_inputs(model.parts, unique[:, 1:], None)
    layers = model.memory_config.memory_layers or ()
    states = run_to_memory_layers(model.parts, layers, **inputs)
    scratch.append(states.keys, states.values, rows, segment_of)


def _new_scratch(model: LongMemModel, cache: WindowCache, sequences: int) -> ScratchMemory:
    config = model.memory_config
    return ScratchMemory(
        groups=cache.rows,
        sequences=sequences,
        capacity=config.memory_size,
        chunk_size=config.chunk_size,
        top_k=config.top_k,
        num_layers=len(config.memory_layers or ()),
        num_key_value_heads=model.parts.num_key_value_heads,
        head_dim=model.parts.head_dim,
        dtype=model.backbone.dtype,
        device=model.device,
    )


def _reader(cache: WindowCache, memory: MemoryBank | None) -> MemoryReader | None:
    if memory is None:
        return None
    bank = BankReader(memory, cache.expand)
    return bank if cache.scratch is None else StackedReader([bank, cache.scratch])


def _unless_full(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask.long()


def _check_kept(
    cache: WindowCache, mask: Tensor, leaving: Tensor, logits_to_keep: int | Tensor
) -> None:
    """Refuse to leave out logits that are wanted."""
    old = cache.mask.sum(dim=1) if cache.sequences else torch.zeros_like(leaving)
    kept = int((mask.sum(dim=1) - (leaving - old).clamp(min=0)).max())
    served = isinstance(logits_to_keep, int) and 0 < logits_to_keep <= kept
    if kept < mask.shape[1] and not served:
        raise ConfigError(
            f"logits can be had for the last {kept} of {mask.shape[1]} tokens, since the window "
            f"holds {cache.length}, got logits_to_keep={logits_to_keep!r}; give fewer tokens at a "
            "time, or logits_to_keep=1"
        )


def _check_batch(cache: WindowCache, input_ids: Tensor) -> None:
    sequences = cache.sequences or len(input_ids)
    if len(input_ids) != sequences or sequences % cache.rows:
        raise ConfigError(
            f"the cache is of {cache.sequences or 'no'} sequences of {cache.rows} prompts, got a "
            f"batch of {len(input_ids)}; continue with the same batch, or without past_key_values"
        )
