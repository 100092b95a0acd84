"""The plug-in contract: what a package implements to add to memlayer.

A plug-in is a module (or object) with functions marked `hookimpl`, named by an entry point of the
group ``memlayer``. The built-in adapters and backends are such plug-ins themselves. A hook only
names things; what it names is imported on first use, so a plug-in module imports nothing heavy.

    # pyproject.toml of the plug-in
    [project.entry-points.memlayer]
    annoy = "memlayer_annoy"

    # memlayer_annoy/__init__.py
    from memlayer import hookimpl

    @hookimpl
    def register_backends(register):
        register("annoy", "memlayer_annoy.backend:AnnoyBackend", requires=("annoy",))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    import typer

PROJECT = "memlayer"
"""The name of the markers and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a function of this file as a hook."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plug-in's function as its implementation of the hook of that name."""


class Register(Protocol):
    """What a ``register_...`` hook is given to name one thing."""

    def __call__(
        self,
        name: str,
        target: str,
        *,
        extra: str | None = None,
        requires: Sequence[str] = (),
        model_types: Sequence[str] = (),
    ) -> None:
        """Name one backend, adapter or task.

        A name that is taken, or that is no name, is recorded as this plug-in's failure; it stops
        neither the plug-in's other names nor another plug-in.

        Args:
            name: what users write: lower-case letters, digits, ``-`` and ``_``.
            target: ``"module:Attribute"``, imported on first use.
            extra: the extra of the plug-in's own distribution that installs what it needs.
            requires: top-level import names without which it is listed as unavailable.
            model_types: adapters only: each ``model_type`` of a Hugging Face config it describes.
        """


@hookspec
def register_backends(register: Register) -> None:
    """Name retrieval backends: subclasses of `memlayer.RetrievalBackend`."""


@hookspec
def register_adapters(register: Register) -> None:
    """Name decoder adapters: instances of `memlayer.DecoderDescription`."""


@hookspec
def register_tasks(register: Register) -> None:
    """Name evaluation tasks: subclasses of `memlayer.evaluation.tasks.task.Task`."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to ``memlayer``.

    Args:
        app: the plug-in's own Typer app; its commands and groups join the ``memlayer`` command,
            unless one has a name that is taken.
    """
