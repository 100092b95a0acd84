"""The retrieval backends that come with memlayer, registered as any third party's are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlayer import hookimpl

if TYPE_CHECKING:
    from memlayer.hookspecs import Register


@hookimpl
def register_backends(register: Register) -> None:
    """Name the backends; each is imported on first use."""
    register("torch", "memlayer_backends.torch_exact:TorchBackend")
