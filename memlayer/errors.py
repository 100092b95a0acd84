"""Exceptions. Everything memlayer raises on purpose derives from MemlayerError.

MemlayerError
├── ConfigError             (also ValueError)   a setting, or two settings together, make no sense
├── ShapeError              (also ValueError)   a tensor's shape, dtype or device is wrong
├── DataError               (also ValueError)   a file or a corpus cannot be used as text
├── UnknownNameError        (also ValueError)   no plug-in, corpus or backbone has that name
├── PluginError             (also ValueError)   a plug-in registered something impossible
├── UnsupportedModelError   (also ValueError)   no decoder adapter describes this model
├── BackendUnavailableError (also ImportError)  a backend's package or hardware is missing
├── CheckpointError         (also ValueError)   a checkpoint is damaged, or for another backbone
├── MemoryFormatError       (also ValueError)   a saved bank is damaged, or made by another model
├── StorageError            (also OSError)      a directory cannot be written: full, locked, in use
└── TrainingError           (also RuntimeError) training cannot go on: a loss that is not finite
"""


class MemlayerError(Exception):
    """Base of every exception that memlayer raises on purpose."""


class ConfigError(MemlayerError, ValueError):
    """A setting, or two settings together, make no sense."""


class ShapeError(MemlayerError, ValueError):
    """A tensor does not have the documented shape, dtype or device, or is not finite."""


class DataError(MemlayerError, ValueError):
    """A file or a corpus cannot be used as text."""


class UnknownNameError(MemlayerError, ValueError):
    """No plug-in, corpus or backbone has that name."""


class PluginError(MemlayerError, ValueError):
    """A plug-in registered something impossible, such as a name that is taken."""


class UnsupportedModelError(MemlayerError, ValueError):
    """No decoder adapter describes this model, or the model lacks what the method needs."""


class BackendUnavailableError(MemlayerError, ImportError):
    """A backend's package, or the hardware that it needs, is missing."""


class CheckpointError(MemlayerError, ValueError):
    """A checkpoint is damaged, or was made for another backbone."""


class MemoryFormatError(MemlayerError, ValueError):
    """A saved memory bank is damaged, or was made by another model."""


class StorageError(MemlayerError, OSError):
    """A directory cannot be written: the disk is full, it is read-only, or another process does."""


class TrainingError(MemlayerError, RuntimeError):
    """Training cannot go on."""
