"""One Hugging Face cache for both networks.

Side layers keep their keys and values behind the backbone's, at layer index ``L + l``. So whatever
``generate`` does to a cache (reordering for beams, repeating rows, cropping) reaches both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from memlayer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Cache


def other_kinds(cache: Cache) -> list[str]:
    """Name the kinds of a cache's layers that hold something else than keys and values."""
    kinds = dict.fromkeys(type(layer) for layer in cache.layers)
    return [
        kind.__name__ for kind in kinds if kind not in (DynamicLayer, DynamicSlidingWindowLayer)
    ]


def with_side_layers(cache: Cache, sources: Sequence[int], depth: int) -> None:
    """Make room in a cache for the side layers, each of the kind of its source layer.

    Args:
        cache: changed in place; one that makes its layers on demand needs nothing.
        sources: for each side layer, the backbone layer that it stands for.
        depth: L, layers of the backbone.

    Raises:
        ConfigError: if the cache is of a kind with fixed layers of another sort.
    """
    if cache.layer_class_to_replicate is not None or len(cache.layers) >= depth + len(sources):
        return
    for source in sources:
        layer = cache.layers[source]
        if type(layer) is DynamicLayer:
            cache.layers.append(DynamicLayer())
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers.append(DynamicSlidingWindowLayer(layer.sliding_window))
        else:
            raise ConfigError(
                f"past_key_values must be a DynamicCache, got {type(cache).__name__} with "
                f"{type(layer).__name__}"
            )
