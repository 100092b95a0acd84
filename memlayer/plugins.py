"""Find plug-ins, load each on its own, and collect what they name.

    entry points of group "memlayer" ──► Plugins.add ──► backends, adapters, tasks (Registry)
                                              └ what went wrong ──► failures

One broken plug-in stops nothing else: an import that fails, a hook that raises, a hook that does
not exist and a name that is taken each become a `PluginFailure`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from memlayer import hookspecs
from memlayer.errors import PluginError, UnknownNameError
from memlayer.hookspecs import PROJECT, Register
from memlayer.registry import Entry, Registry, Source

DISTRIBUTION = "memlayer-lm"
"""The distribution whose plug-ins are loaded first, and always."""

ENVIRONMENT_VARIABLE = "MEMLAYER_PLUGINS"
"""Names, separated by commas, of the distributions whose plug-ins are loaded beside memlayer's own;
empty for none. Not set, all installed ones are loaded."""


@dataclass(frozen=True)
class PluginFailure:
    """Something that a plug-in did wrong.

    Attributes:
        name: the entry point's name.
        distribution: the distribution that it came with, if any.
        error: what was raised.
    """

    name: str
    distribution: str | None
    error: BaseException

    @property
    def reason(self) -> str:
        """What was raised, in one line."""
        text = " ".join(str(self.error).split())
        if isinstance(self.error, PluginError | UnknownNameError):
            return text
        return f"{type(self.error).__name__}: {text}"


@dataclass(frozen=True)
class LoadedPlugin:
    """A plug-in whose hooks can be called."""

    source: Source
    plugin: object


class Plugins:
    """What the loaded plug-ins named, and which plug-ins failed."""

    def __init__(self) -> None:
        self.manager = _new_manager()
        self.loaded: list[LoadedPlugin] = []
        self.failures: list[PluginFailure] = []
        self.backends = Registry("backend", self.failures)
        self.adapters = Registry("adapter", self.failures)
        self.tasks = Registry("task", self.failures)

    def add(self, plugin: object, source: Source) -> None:
        """Register a plug-in and let it name its things; what fails goes to `failures`."""
        with self.isolated(source):
            _check(plugin, source)
            if self.manager.is_registered(plugin):
                raise PluginError(f"{source} is the same object as a plug-in loaded before")
            self.manager.register(plugin, name=f"{source.plugin} {len(self.loaded)}")
            loaded = LoadedPlugin(source, plugin)
            self.loaded.append(loaded)
            for hook, registry in (
                ("register_backends", self.backends),
                ("register_adapters", self.adapters),
                ("register_tasks", self.tasks),
            ):
                with self.isolated(source):
                    self.call(loaded, hook, register=self._register_into(registry, source))

    def call(self, loaded: LoadedPlugin, hook: str, **arguments: Any) -> None:
        """Call one plug-in's implementations of a hook, usually within `isolated`."""
        others = [other.plugin for other in self.loaded if other is not loaded]
        self.manager.subset_hook_caller(hook, others)(**arguments)

    @contextmanager
    def isolated(self, source: Source) -> Iterator[None]:
        """Record whatever is raised inside as a failure of this plug-in."""
        try:
            yield
        # A plug-in that calls sys.exit on import must not end the program either.
        except (Exception, SystemExit) as error:
            self.failures.append(PluginFailure(source.plugin, source.distribution, error))

    def _register_into(self, registry: Registry, source: Source) -> Register:
        def register(
            name: str,
            target: str,
            *,
            extra: str | None = None,
            requires: Iterable[str] = (),
            model_types: Iterable[str] = (),
        ) -> None:
            with self.isolated(source):
                entry = Entry(
                    name=name,
                    target=target,
                    source=source,
                    extra=extra,
                    requires=_names("requires", name, requires),
                    model_types=_names("model_types", name, model_types),
                )
                if bool(entry.model_types) != (registry is self.adapters):
                    raise PluginError(
                        f"adapters, and only they, have model_types; {registry.kind} {name!r} of "
                        f"{source} has {list(entry.model_types)}"
                    )
                registry.add(entry)

        return register


def load_plugins(*, entry_points: bool = True, extra: Iterable[object] = ()) -> Plugins:
    """Load plug-ins into a new manager; nothing is shared with an earlier call.

    Args:
        entry_points: load the installed plug-ins, memlayer's own first, then by distribution and
            name. The environment variable ``MEMLAYER_PLUGINS`` may restrict them.
        extra: plug-in modules or objects to load after those.
    """
    plugins = Plugins()
    if entry_points:
        for entry_point in _installed(plugins):
            source = _source(entry_point)
            with plugins.isolated(source):
                plugins.add(entry_point.load(), source)
    for plugin in extra:
        name = getattr(plugin, "__name__", type(plugin).__name__)
        plugins.add(plugin, Source(plugin=name))
    return plugins


@cache
def default_plugins() -> Plugins:
    """Give the installed plug-ins, loaded on the first call."""
    return load_plugins()


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _check(plugin: object, source: Source) -> None:
    # On a manager of its own: a plug-in that fails half-way leaves nothing in ours.
    hash(plugin)  # pluggy keeps plug-ins in sets
    manager = _new_manager()
    manager.register(plugin, name=source.plugin)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"{source} implements no hook; mark its functions with memlayer.hookimpl")


def _names(field: str, name: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise PluginError(f"{field} of {name!r} must be a sequence of names, got {values!r}")
    return tuple(values)


def _installed(plugins: Plugins) -> list[EntryPoint]:
    found = sorted(entry_points(group=PROJECT), key=_order)
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted is None:
        return found
    names = {_canonical(name) for name in wanted.split(",") if name.strip()}
    known = {_distribution(entry_point) for entry_point in found}
    for name in sorted(names - known):
        with plugins.isolated(Source(plugin=name)):
            raise UnknownNameError(
                f"{ENVIRONMENT_VARIABLE} names {name!r}, and no such distribution has plug-ins; "
                f"known: {', '.join(sorted(known))}"
            )
    return [item for item in found if _distribution(item) in names | {DISTRIBUTION}]


def _order(entry_point: EntryPoint) -> tuple[bool, str, str]:
    distribution = _distribution(entry_point)
    return distribution != DISTRIBUTION, distribution, entry_point.name


def _distribution(entry_point: EntryPoint) -> str:
    return _canonical(entry_point.dist.name) if entry_point.dist else ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _source(entry_point: EntryPoint) -> Source:
    dist = entry_point.dist
    return Source(
        plugin=entry_point.name,
        distribution=dist.name if dist else None,
        version=dist.version if dist else None,
    )
