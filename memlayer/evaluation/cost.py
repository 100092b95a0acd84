"""What a past costs: time of one more segment, and bytes, in memory and as dense context.

    backbone   no past                            forward
    dense      the bare backbone's cache of it    forward, after which the cache is longer
    memory     a bank that holds it               encode, read, remember

What past keys are does not change what they cost, so that no text is read for it: the cache is one
segment many times over, and the bank's keys are drawn with the mean and deviation of a segment's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from memlayer.benchmarking.machine import Machine
from memlayer.benchmarking.timing import Timing, interleave
from memlayer.errors import ConfigError
from memlayer.modes import evaluating

if TYPE_CHECKING:
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one condition with one length of the past.

    Attributes:
        condition: ``"backbone"``, ``"dense"`` or ``"memory"``.
        past: tokens of it.
        seconds: of one more segment, logits of all its tokens included.
        bytes: that hold the past: keys and values of every layer's cache; of the bank, those of
            its memory layers and its chunk keys, without the backend's index.
    """

    condition: str
    past: int
    seconds: Timing
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CostResult:
    """What was measured, and where.

    Attributes:
        segment_length: tokens of the segment that was timed.
        rounds: that medians are of; conditions took turns within each.
        dtype: of the backbone.
        machine: fields of `memlayer.benchmarking.machine.Machine`.
        costs: by past, and by condition within it.
        notes: what was left out, and why.
    """

    segment_length: int
    rounds: int
    dtype: str
    machine: Mapping[str, Any]
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return asdict(self)


def measure_cost(
    model: LongMemModel,
    pasts: Sequence[int],
    *,
    segment_length: int | None = None,
    rounds: int = 3,
    seed: int = 0,
) -> CostResult:
    """Time one segment after pasts of several lengths; the model's own memory stays as it is.

    Args:
        model: a wrapped model.
        pasts: tokens, multiples of the segment.
        segment_length: tokens of the segment; the model's if None.
        rounds: at least 1.
        seed: of token ids and keys.

    Raises:
        ConfigError: if a length does not fit.
    """
    segment = model.memory_config.segment_length if segment_length is None else segment_length
    if segment < 1:
        raise ConfigError(f"segment_length must be at least 1, got {segment}")
    for past in pasts:
        if past < segment or past % segment:
            raise ConfigError(
                f"pasts must be multiples of the segment's {segment} tokens, at least one of them, "
                f"got {past}"
            )
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    generator = torch.Generator().manual_seed(seed)
    config = model.backbone.config.get_text_config(decoder=True)
    ids = torch.randint(config.vocab_size, (1, segment), generator=generator).to(model.device)
    longest = getattr(config, "max_position_embeddings", None)
    with torch.inference_mode(), evaluating(model):
        costs = [
            cost
            for past in sorted(set(pasts))
            for cost in _costs(model, ids, past, longest, rounds, generator)
        ]
    beyond = [past for past in pasts if longest is not None and past + segment > longest]
    notes = (
        (f"no dense context from {min(beyond)} tokens: the backbone has {longest} positions",)
        if beyond
        else ()
    )
    return CostResult(
        segment_length=segment,
        rounds=rounds,
        dtype=str(model.backbone.dtype).removeprefix("torch."),
        machine=Machine.here(model.device).to_dict(),
        costs=tuple(costs),
        notes=notes,
    )


def _costs(
    model: LongMemModel,
    ids: Tensor,
    past: int,
    longest: int | None,
    rounds: int,
    generator: torch.Generator,
) -> Iterator[Cost]:
    bank = _filled_bank(model, ids, past, generator)
    sides: dict[str, Callable[[], object]] = {
        "backbone": lambda: model.backbone(input_ids=ids, use_cache=False),
        "memory": lambda: _read_and_remember(model, ids, bank),
    }
    sizes = {"backbone": 0, "memory": bank.nbytes}
    if longest is None or past + ids.shape[1] <= longest:
        cache = _filled_cache(model, ids, past)
        sizes["dense"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in _filled(cache))
        sides["dense"] = lambda: model.backbone(input_ids=ids, past_key_values=_same(cache))
    seconds = interleave(list(sides.values()), rounds=rounds, device=model.device)
    for condition, times in zip(sides, seconds, strict=True):
        yield Cost(condition=condition, past=past, seconds=Timing.of(times), bytes=sizes[condition])


def _read_and_remember(model: LongMemModel, ids: Tensor, bank: MemoryBank) -> Tensor:
    states = model.encode(ids)
    logits = model.read(states, bank)
    model.remember(states, bank)
    return logits


def _filled_bank(
    model: LongMemModel, ids: Tensor, past: int, generator: torch.Generator
) -> MemoryBank:
    """Give a bank that is full with ``past`` tokens, so that what is timed overwrites as much."""
    bank = model.new_memory(past)
    states = model.encode(ids)
    means = [keys.mean(dim=2, keepdim=True) for keys in states.keys]
    deviations = [keys.std(dim=2, keepdim=True) for keys in states.keys]
    for _ in range(past // ids.shape[1]):
        for number, keys in enumerate(states.keys):
            drawn = torch.randn(keys.shape, generator=generator).to(keys)
            states.keys[number] = means[number] + deviations[number] * drawn
        model.remember(states, bank)
    return bank


def _filled_cache(model: LongMemModel, ids: Tensor, past: int) -> DynamicCache:
    """Give the bare backbone's cache after ``past`` tokens: one segment's, many times over."""
    cache = DynamicCache(config=model.backbone.config)
    model.backbone(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    times = past // ids.shape[1] - 1
    if times:
        for number, layer in enumerate(_filled(cache)):
            more = (held.repeat(1, 1, times, 1) for held in (layer.keys, layer.values))
            cache.update(*more, number)
    return cache


def _filled(cache: DynamicCache) -> list[Any]:
    """Leave out layers that read another's keys and hold none; they are the last ones."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.is_initialized]


def _same(cache: DynamicCache) -> DynamicCache:
    """Give a cache that grows by itself over the same tensors, which growing leaves as they are."""
    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    return grown
