"""Which device a name stands for."""

from __future__ import annotations

from memlayer.errors import ConfigError


def choose_device(name: str) -> str:
    """Resolve ``"auto"`` and check that the device is there.

    Raises:
        ConfigError: if torch knows no such device, or this machine has none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device must be one that torch can use here, such as auto or cpu, got {name!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
    return name
