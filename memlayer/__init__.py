"""Long-term memory for any Hugging Face decoder.

    model = memlayer.wrap(backbone, memlayer.LongMemConfig(backend="torch"))
    model.memorize(input_ids)
    model.generate(**inputs)

Names are imported on first use: ``import memlayer`` alone imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memlayer.backbones import load_backbone
    from memlayer.checkpoint import load
    from memlayer.config import LongMemConfig
    from memlayer.decoders import DecoderDescription, Projection
    from memlayer.errors import (
        BackendUnavailableError,
        CheckpointError,
        ConfigError,
        DataError,
        MemlayerError,
        MemoryFormatError,
        PluginError,
        ShapeError,
        StorageError,
        TrainingError,
        UnknownNameError,
        UnsupportedModelError,
    )
    from memlayer.hookspecs import hookimpl, hookspec
    from memlayer.memory import MemoryBank
    from memlayer.model import LongMemModel, wrap
    from memlayer.retrieval import RetrievalBackend, SearchResult

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DecoderDescription",
    "LongMemConfig",
    "LongMemModel",
    "MemlayerError",
    "MemoryBank",
    "MemoryFormatError",
    "PluginError",
    "Projection",
    "RetrievalBackend",
    "SearchResult",
    "ShapeError",
    "StorageError",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "hookimpl",
    "hookspec",
    "load",
    "load_backbone",
    "wrap",
]

_MODULES = {
    "backbones": ("load_backbone",),
    "checkpoint": ("load",),
    "config": ("LongMemConfig",),
    "decoders": ("DecoderDescription", "Projection"),
    "errors": (
        "BackendUnavailableError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "MemlayerError",
        "MemoryFormatError",
        "PluginError",
        "ShapeError",
        "StorageError",
        "TrainingError",
        "UnknownNameError",
        "UnsupportedModelError",
    ),
    "hookspecs": ("hookimpl", "hookspec"),
    "memory": ("MemoryBank",),
    "model": ("LongMemModel", "wrap"),
    "retrieval": ("RetrievalBackend", "SearchResult"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

# Hidden from type checkers, which would take every name for a public one.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'memlayer' has no attribute {name!r}")
        value = getattr(import_module(f"memlayer.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
