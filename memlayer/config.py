"""The settings of a memory-augmented model, and how they are written to JSON.

Frozen and checked on construction: a `LongMemConfig` that exists makes sense, apart from what
depends on the backbone (`memory_layers` against its depth), which `memlayer.wrap` checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from memlayer.errors import ConfigError

FORMAT_VERSION = 1

SideInit = Literal["replace", "identity", "backbone"]
Fusion = Literal["gate", "softmax"]
MemoryScope = Literal["row", "batch"]
MemoryStorage = Literal["device", "host"]
ChunkKey = Literal["mean"]


@dataclass(frozen=True, kw_only=True)
class LongMemConfig:
    """What is kept, how it is searched and how it is read.

    All sizes count tokens. Defaults are the paper's (arXiv:2306.07174), except ``side_init``,
    where the paper's choice is ``"backbone"`` (docs/design.md says why ours is another).

    Raises:
        ConfigError: if a field has a wrong value; the message names field, value and remedy.
    """

    backend: str = "auto"
    """Name of the retrieval backend; ``memlayer plugins`` lists them."""

    backend_options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword options of the backend, as its documentation lists them."""

    memory_size: int = 65_536
    """Tokens that each row's memory holds before the oldest chunk is dropped. Multiple of
    ``chunk_size``."""

    chunk_size: int = 4
    """Tokens behind one index entry."""

    top_k: int = 64
    """Tokens read back per query token and head. Multiple of ``chunk_size``."""

    memory_layers: tuple[int, ...] | None = None
    """Backbone layers, from 0, whose keys and values are kept. None: one, at 3/4 of the depth."""

    layer_reduction_factor: int = 2
    """Backbone layers per side-network layer."""

    segment_length: int = 1024
    """Tokens of one forward in training and evaluation: the local window."""

    side_init: SideInit = "replace"
    """How side layers stand to the backbone layers that they are copies of. ``"replace"``: in their
    place; with an empty memory the wrapped model starts as the backbone. ``"identity"``: beside
    them, with a weight that starts at 0, and so as the backbone too. ``"backbone"``: beside them,
    with weight 1, as in the paper."""

    side_rank: int | None = None
    """None: side layers are full copies, all of whose weights train. A number: they run the
    backbone's own weights, and low-rank updates of that rank train on every linear map (LoRA,
    arXiv:2106.09685). With ``layer_reduction_factor=1`` that is LoRA of the whole backbone, reading
    what the untouched one wrote."""

    coupled: bool = False
    """No side network: only the layers that read memory are copied and trained, and the backbone's
    own layers run on what they give. A control (MemTRM, after Memorizing Transformers,
    arXiv:2203.08913), with ``layer_reduction_factor=1``; the keys and values in memory are the
    frozen layer's all the same."""

    normed_residual: bool = False
    """Let the last side layer's residual end at the backbone's output behind its final norm, which
    mixes two scales. Released LongMem checkpoints were trained so; with ``side_init="backbone"``
    only."""

    fusion: Fusion = "gate"
    """How a head mixes what it found in memory with its local attention. ``"gate"``: by one learned
    weight, wherever it found anything; the paper's. ``"softmax"``: in one softmax over local and
    retrieved tokens, with a learned bias on the retrieved ones' scores, so that each token takes
    what fits it better than its window does. Needs ``attn_implementation="sdpa"``."""

    memory_distance: int | None = None
    """Tokens between a query and whatever it retrieves, as its rotary embedding sees it; rotary
    backbones only. None: with ``fusion="gate"`` neither side is rotated, with ``"softmax"``
    whatever is retrieved stands where the window begins."""

    recency_bias: bool = False
    """Learn for each head how much less counts what was written longer ago: the scores of what it
    retrieved fall with the logarithm of their age (`memlayer.attention.recency_bias`), from 0 at
    the start of training. Without it memory does not know what is recent."""

    memory_scope: MemoryScope = "row"
    """``"row"``: each row of a batch reads its own memory only. ``"batch"``: all rows share one."""

    memory_storage: MemoryStorage = "device"
    """Where stored keys and values lie. ``"device"``: beside the model. ``"host"``: in main memory,
    or in the file that a saved bank is mapped from; only the index is on the device, and each
    forward brings the chunks that it found there. Results are the same."""

    chunk_key: ChunkKey = "mean"
    """How a chunk's tokens make one index key: the mean of their keys."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("memory_size", "chunk_size", "top_k", "layer_reduction_factor"):
            _at_least(name, getattr(self, name), 1)
        _at_least("segment_length", self.segment_length, 2)
        for name in ("memory_size", "top_k"):
            self._check_multiple_of_chunk_size(name)
        if self.top_k > self.memory_size:
            raise ConfigError(
                f"top_k must be at most memory_size, got top_k={self.top_k} and "
                f"memory_size={self.memory_size}"
            )
        if self.memory_distance is not None:
            _at_least("memory_distance", self.memory_distance, 0)
        for name, allowed in (
            ("side_init", get_args(SideInit)),
            ("fusion", get_args(Fusion)),
            ("memory_scope", get_args(MemoryScope)),
            ("memory_storage", get_args(MemoryStorage)),
            ("chunk_key", get_args(ChunkKey)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r:.80}"
                )
        if self.side_rank is not None:
            _at_least("side_rank", self.side_rank, 1)
            if self.side_init != "replace":
                raise ConfigError(f'side_rank needs side_init="replace", got {self.side_init!r}')
        if self.normed_residual and self.side_init != "backbone":
            raise ConfigError(f'normed_residual needs side_init="backbone", got {self.side_init!r}')
        if self.coupled and (self.side_init != "replace" or self.layer_reduction_factor != 1):
            raise ConfigError(
                f'coupled needs side_init="replace" and layer_reduction_factor=1, got '
                f"{self.side_init!r} and {self.layer_reduction_factor}"
            )
        self._check_memory_layers()

    def _check_types(self) -> None:
        for name in (
            "memory_size",
            "chunk_size",
            "top_k",
            "layer_reduction_factor",
            "segment_length",
            "memory_distance",
            "side_rank",
        ):
            value = getattr(self, name)
            optional = name in ("memory_distance", "side_rank") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name} must be a whole number, got {value!r:.80}")
        for name in ("normed_residual", "coupled", "recency_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r:.80}")
        if not isinstance(self.backend, str) or not self.backend:
            raise ConfigError(f"backend must be a name, got {self.backend!r:.80}")
        if not isinstance(self.backend_options, Mapping):
            raise ConfigError(
                f"backend_options must be a mapping, got {self.backend_options!r:.80}"
            )

    def _check_multiple_of_chunk_size(self, name: str) -> None:
        value = getattr(self, name)
        if value % self.chunk_size:
            smaller = value - value % self.chunk_size
            fits = smaller or self.chunk_size
            raise ConfigError(
                f"{name} must be a multiple of chunk_size={self.chunk_size}, got {value}; "
                f"the nearest value that fits is {fits}"
            )

    def _check_memory_layers(self) -> None:
        layers = self.memory_layers
        if layers is None:
            return
        if (
            isinstance(layers, str)
            or not isinstance(layers, Sequence)
            or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
        ):
            raise ConfigError(f"memory_layers must be whole numbers, got {layers!r:.80}")
        object.__setattr__(self, "memory_layers", tuple(layers))
        if not layers or min(layers) < 0 or sorted(set(layers)) != list(layers):
            raise ConfigError(
                "memory_layers must be layer numbers from 0 in rising order, got "
                f"{list(layers)!s:.80}"
            )

    def for_depth(self, depth: int) -> LongMemConfig:
        """Fill in ``memory_layers`` for a backbone of ``depth`` layers, and check the fit.

        Raises:
            ConfigError: if the backbone has too few layers.
        """
        if depth < self.layer_reduction_factor:
            raise ConfigError(
                f"layer_reduction_factor must be at most the backbone's {depth} layers, got "
                f"{self.layer_reduction_factor}"
            )
        if self.memory_layers is None:
            # The paper's 18th of 24 layers, counted from 0.
            return replace(self, memory_layers=(max(3 * depth // 4 - 1, 0),))
        if self.memory_layers[-1] >= depth:
            raise ConfigError(
                f"memory_layers must be within 0 to {depth - 1}, got {list(self.memory_layers)}; "
                f"the backbone has {depth} layers"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types, with the version of their format."""
        values = asdict(self)
        values["backend_options"] = dict(self.backend_options)
        values["memory_layers"] = None if self.memory_layers is None else list(self.memory_layers)
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LongMemConfig:
        """Make a config from what `to_dict` gave.

        Raises:
            ConfigError: if the format is newer than this version reads, or a key is unknown.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ConfigError(
                f"the configuration has format_version {version!r:.40}, this memlayer reads "
                f"1 to {FORMAT_VERSION}; install the memlayer that wrote it"
            )
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"the configuration has unknown keys {', '.join(unknown)[:80]}; known: "
                f"{', '.join(sorted(known))}"
            )
        if isinstance(values.get("memory_layers"), list):
            values["memory_layers"] = tuple(values["memory_layers"])
        return cls(**values)


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, got {value}")
