"""Names of one kind (backends, adapters, tasks), and the objects they stand for.

Nothing is imported to list names. `Registry.get` imports what a name stands for.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sized
from dataclasses import dataclass
from difflib import get_close_matches
from pkgutil import resolve_name

from memlayer.errors import BackendUnavailableError, PluginError, UnknownNameError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a plug-in comes from."""

    plugin: str
    """The entry point's name, or the plug-in object's own."""

    distribution: str | None = None
    """The installed distribution that has the entry point; None for an object given directly."""

    version: str | None = None
    """That distribution's version."""

    def __str__(self) -> str:
        if self.distribution is None:
            return f"plug-in {self.plugin!r}"
        return f"plug-in {self.plugin!r} of {self.distribution} {self.version}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One registered name.

    Raises:
        PluginError: if a field cannot be what it should be.
    """

    name: str
    target: str
    """``"module:Attribute"``."""
    source: Source
    extra: str | None = None
    requires: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise PluginError(
                f"a name has lower-case letters, digits, - and _ only, got {self.name!r}"
            )
        if not _TARGET.fullmatch(self.target):
            raise PluginError(
                f"the target of {self.name!r} must be 'module:Attribute', got {self.target!r}"
            )
        for module in self.requires:
            if not module.isidentifier():
                raise PluginError(
                    f"requires of {self.name!r} must be top-level import names, got {module!r}"
                )

    @property
    def install_command(self) -> str | None:
        """The command that installs what this needs, where the plug-in has an extra for it."""
        if self.extra is None or self.source.distribution is None:
            return None
        return f'pip install "{self.source.distribution}[{self.extra}]"'

    def missing(self) -> list[str]:
        """Give those of `requires` that cannot be imported here; imports nothing."""
        return [name for name in self.requires if not _is_importable(name)]


class Registry:
    """The names of one kind; the first plug-in to register a name keeps it.

    Args:
        kind: what the names stand for, in the singular: ``"backend"``.
        failures: the plug-ins that failed, a live list: an unknown name may be one of theirs.
    """

    def __init__(self, kind: str, failures: Sized = ()) -> None:
        self.kind = kind
        self._failures = failures
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Register one name.

        Raises:
            PluginError: if the name, or one of its model types, is taken.
        """
        taken = self._entries.get(entry.name)
        if taken is not None:
            raise PluginError(
                f"{self.kind} {entry.name!r} of {entry.source} is already registered by "
                f"{taken.source}, which keeps it"
            )
        for other in self._entries.values():
            for model_type in sorted(set(other.model_types) & set(entry.model_types)):
                raise PluginError(
                    f"model type {model_type!r} of {self.kind} {entry.name!r} of {entry.source} "
                    f"is already described by {other.name!r} of {other.source}, which keeps it"
                )
        self._entries[entry.name] = entry

    def names(self) -> list[str]:
        """Give all names, sorted."""
        return sorted(self._entries)

    def entries(self) -> list[Entry]:
        """Give all entries, in the order of `names`."""
        return [self._entries[name] for name in self.names()]

    def entry(self, name: str) -> Entry:
        """Give the entry of a name.

        Raises:
            UnknownNameError: if no plug-in registered it; the message lists the known names.
        """
        if name not in self._entries:
            raise UnknownNameError(self._unknown(name))
        return self._entries[name]

    def get(self, name: str) -> object:
        """Import what a name stands for.

        Raises:
            UnknownNameError: if no plug-in registered it.
            BackendUnavailableError: if a package that it requires is not installed.
            PluginError: if its module or attribute cannot be imported.
        """
        entry = self.entry(name)
        missing = self._missing(entry)
        if missing is not None:
            raise BackendUnavailableError(f"{self.kind} {name!r} {missing}")
        try:
            return resolve_name(entry.target)
        except Exception as error:  # whatever a plug-in's module does on import
            raise PluginError(
                f"{self.kind} {name!r} of {entry.source} cannot be imported from "
                f"{entry.target}: {type(error).__name__}: {error}"
            ) from error

    def unavailable_reason(self, name: str) -> str | None:
        """Say why a name cannot be used here, with the remedy, or give None if it can.

        Imports what the name stands for, unless a package that it requires is missing: a class
        with a class method ``unavailable_reason`` is asked as well.
        """
        entry = self.entry(name)
        missing = self._missing(entry)
        if missing is not None:
            return missing
        try:
            target = self.get(name)
        except PluginError as error:
            return str(error)
        check = getattr(target, "unavailable_reason", None)
        if not isinstance(target, type) or check is None:
            return None
        try:
            reason: str | None = check()
        except Exception as error:  # a plug-in's code: its failure is the reason
            return f"its own check failed: {type(error).__name__}: {error}"
        return reason

    def _missing(self, entry: Entry) -> str | None:
        missing = entry.missing()
        if not missing:
            return None
        command = f": {entry.install_command}" if entry.install_command else ""
        return f"needs the Python package {', '.join(missing)}, which is not installed{command}"

    def _unknown(self, name: str) -> str:
        message = f"unknown {self.kind} {name!r:.80}; known: {', '.join(self.names()) or 'none'}."
        near = get_close_matches(name, self.names(), n=1)
        if near:
            message += f" Did you mean {near[0]!r}?"
            missing = self._missing(self._entries[near[0]])
            message += f" It {missing}" if missing else ""
        if len(self._failures):
            message += f" Plug-ins that failed: {len(self._failures)}; see 'memlayer plugins'."
        return message


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # find_spec's way of saying: imported, and without a spec
        return True
