"""A model with its memory, from names: of a checkpoint or a backbone, and of a bank on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlayer.backbones import load_backbone
from memlayer.checkpoint import find_checkpoint, load, read_config
from memlayer.config import LongMemConfig, MemoryStorage
from memlayer.devices import choose_device
from memlayer.errors import ConfigError
from memlayer.memory.identity import identity_layers
from memlayer.memory.store import bank_info
from memlayer.model import wrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlayer.model import LongMemModel
    from memlayer.plugins import Plugins


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """Which model to load, and what to change in its settings.

    Raises:
        ConfigError: if not exactly one of checkpoint and backbone is given, or a setting that a
            checkpoint fixes is given with one.
    """

    checkpoint: str | None = None
    """What `memlayer.load` takes: a trained side network."""

    backbone: str | None = None
    """What `memlayer.load_backbone` takes, for a side network that nobody trained."""

    backend: str | None = None
    """A retrieval backend; None: the checkpoint's, or the default."""

    memory_size: int | None = None
    """Tokens that memory holds; None: as the bank, else the checkpoint, else the default."""

    memory_storage: MemoryStorage | None = None
    """Where stored keys and values lie, ``"device"`` or ``"host"``; None: as the checkpoint, else
    the default."""

    memory_layers: tuple[int, ...] | None = None
    """With a backbone: layers whose keys and values are kept; None: as the bank, else one, at 3/4
    of the depth."""

    segment_length: int | None = None
    """With a backbone: tokens of a window; None: the default."""

    dtype: str = "fp32"
    """Of the backbone."""

    device: str = "auto"
    """``"auto"`` is ``"cuda"`` where there is one, else ``"cpu"``."""

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.backbone is None):
            raise ConfigError(
                f"give either a checkpoint or a backbone, got checkpoint={self.checkpoint!r} and "
                f"backbone={self.backbone!r}"
            )
        for name in ("memory_layers", "segment_length"):
            value = getattr(self, name)
            if self.checkpoint is not None and value is not None:
                raise ConfigError(
                    f"{name} is fixed by the checkpoint {self.checkpoint!r}, got {value}; leave it "
                    "out"
                )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A wrapped model in eval mode, and its tokenizer."""

    model: LongMemModel
    tokenizer: PreTrainedTokenizerBase
    backbone: str
    """What the backbone was loaded by."""


def load_model(
    names: ModelNames,
    *,
    bank: str | Path | None = None,
    remember: bool = True,
    plugins: Plugins | None = None,
) -> LoadedModel:
    """Load a model, and what it remembers.

    Args:
        names: which model.
        bank: a bank's directory: the model gets its size, layers and contents. It is looked at
            before the model, since it is quicker to get wrong. None: the memory is empty.
        remember: False takes the bank's settings, and leaves the memory empty.
        plugins: where backends and adapters come from; what is installed if None.

    Raises:
        MemoryFormatError: if there is no bank, or it is damaged or of another model.
        MemlayerError: of the kind that fits whatever else is wrong with the names.
    """
    changes = {} if bank is None else _bank_settings(names, bank)
    for name in ("memory_size", "memory_storage"):
        if getattr(names, name) is not None:
            changes[name] = getattr(names, name)
    place = {"dtype": names.dtype, "device": choose_device(names.device)}
    if names.checkpoint is not None:
        saved = read_config(find_checkpoint(names.checkpoint))
        loaded = load_backbone(str(saved["base_model_name_or_path"]), **place)
        model = load(names.checkpoint, loaded.model, names.backend, plugins=plugins, **changes)
    else:
        assert names.backbone is not None  # ModelNames has checked it.
        given = {
            "backend": names.backend,
            "memory_layers": names.memory_layers,
            "segment_length": names.segment_length,
        }
        changes |= {name: value for name, value in given.items() if value is not None}
        config = LongMemConfig(**changes)
        loaded = load_backbone(names.backbone, **place)
        model = wrap(loaded.model, config, plugins=plugins)
    model.eval()
    if bank is not None and remember:
        model.memory.load(bank)
    return LoadedModel(model=model, tokenizer=loaded.tokenizer, backbone=loaded.name)


def _bank_settings(names: ModelNames, bank: str | Path) -> dict[str, Any]:
    info = bank_info(bank)
    settings: dict[str, Any] = {"memory_size": info.capacity}
    if names.backbone is not None:
        # A side network that nobody trained takes whatever the bank was made with.
        settings["chunk_size"] = info.chunk_size
        layers: Sequence[int] | None = identity_layers(info.identity)
        if layers is not None:
            settings["memory_layers"] = tuple(layers)
    return settings
