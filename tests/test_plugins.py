from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from memlayer import BackendUnavailableError, PluginError, UnknownNameError, hookimpl
from memlayer.plugins import load_plugins

if TYPE_CHECKING:
    from pathlib import Path

    from memlayer.hookspecs import Register
    from memlayer.plugins import Plugins


class Named:
    """A plug-in object that registers backends from ``(name, target)`` pairs, as written."""

    def __init__(self, *names: str, **options: object) -> None:
        self.names = names
        self.options = options

    @hookimpl
    def register_backends(self, register: Register) -> None:
        for name in self.names:
            register(name, "collections:OrderedDict", **self.options)


def only(*plugins: object) -> Plugins:
    return load_plugins(entry_points=False, extra=plugins)


def reasons(plugins: Plugins) -> list[str]:
    return [failure.reason for failure in plugins.failures]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of importable packages; calling it installs a distribution with one plug-in."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)

    def install(distribution: str, module: str, source: str, *, version: str = "1.0") -> Path:
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[memlayer]\n{module} = {module}\n")
        return tmp_path

    yield install
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


GOOD = """
from memlayer import hookimpl

@hookimpl
def register_backends(register):
    register("good", "good_search:Good", extra="fast", requires=("no_such_library",))

class Good: ...
"""
BROKEN_IMPORT = "import no_such_module_anywhere\n"
EXITS = "import sys\nsys.exit('not today')\n"
RAISING_HOOK = """
from memlayer import hookimpl

@hookimpl
def register_backends(register):
    register("before", "raising_hook:Before")
    raise RuntimeError("the hook fell over")

@hookimpl
def register_tasks(register):
    register("after", "raising_hook:After")
"""
UNKNOWN_HOOK = """
from memlayer import hookimpl

@hookimpl
def register_backend(register): ...
"""
WRONG_ARGUMENT = """
from memlayer import hookimpl

@hookimpl
def register_backends(registry): ...
"""
NO_HOOK = "def register_backends(register): ...\n"
DUPLICATE = """
from memlayer import hookimpl

@hookimpl
def register_adapters(register):
    register("llama", "duplicate:LLAMA", model_types=("mine",))
    register("mine", "duplicate:MINE", model_types=("mine",))
    register("theirs", "duplicate:THEIRS", model_types=("mistral",))
"""


def test_the_built_in_plugins_load_without_a_failure():
    plugins = load_plugins()
    assert plugins.failures == []
    assert {"gpt2", "llama", "opt"} <= set(plugins.adapters.names())
    assert {"torch", "faiss", "faiss-gpu", "hnswlib", "auto"} <= set(plugins.backends.names())


def test_every_available_built_in_can_be_imported():
    plugins = load_plugins()
    for registry in (plugins.backends, plugins.adapters, plugins.tasks):
        for name in registry.names():
            if not registry.entry(name).missing():
                assert registry.get(name) is not None


def test_each_load_gives_a_manager_of_its_own():
    first, second = only(Named("a")), only(Named("a"))
    assert first.manager is not second.manager
    assert first.failures == second.failures == []


def test_an_installed_package_registers_a_backend(site):
    site("good-search", "good_search", GOOD, version="2.1")
    plugins = load_plugins()
    entry = plugins.backends.entry("good")
    assert plugins.failures == []
    assert str(entry.source) == "plug-in 'good_search' of good-search 2.1"
    assert entry.install_command == 'pip install "good-search[fast]"'


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (BROKEN_IMPORT, "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        (EXITS, "SystemExit: not today"),
        (RAISING_HOOK, "RuntimeError: the hook fell over"),
        (UNKNOWN_HOOK, "register_backend"),
        (WRONG_ARGUMENT, "Argument(s) {'registry'} are declared in the hookimpl but can not"),
        (NO_HOOK, "plug-in 'bad_plugin' of bad-plugin 1.0 implements no hook"),
    ],
    ids=["broken import", "exit", "raising hook", "unknown hook", "wrong argument", "no hook"],
)
def test_a_broken_plugin_is_reported_and_stops_no_other(site, source, reason):
    site("bad-plugin", "bad_plugin", source)
    site("good-search", "good_search", GOOD)
    plugins = load_plugins()
    (failure,) = plugins.failures
    assert (failure.name, failure.distribution) == ("bad_plugin", "bad-plugin")
    assert reason in failure.reason
    assert "good" in plugins.backends.names()
    assert "llama" in plugins.adapters.names()


def test_a_hook_that_raises_leaves_the_plugins_other_hooks(site):
    site("raising", "raising_hook", RAISING_HOOK)
    plugins = load_plugins()
    assert "before" in plugins.backends.names()
    assert "after" in plugins.tasks.names()


def test_a_taken_name_stays_with_the_first_and_the_error_names_both(site):
    site("duplicate", "duplicate", DUPLICATE)
    plugins = load_plugins()
    assert str(plugins.adapters.entry("llama").source).startswith("plug-in 'adapters' of memlayer")
    name_taken, model_type_taken = plugins.failures
    assert name_taken.reason.startswith(
        "adapter 'llama' of plug-in 'duplicate' of duplicate 1.0 is already registered by "
        "plug-in 'adapters' of memlayer-lm"
    )
    assert "model type 'mistral' of adapter 'theirs'" in model_type_taken.reason
    assert "is already described by 'llama' of plug-in 'adapters'" in model_type_taken.reason
    assert plugins.adapters.entry("mine").source.distribution == "duplicate"


def test_built_ins_come_first_whatever_a_distribution_is_called(site):
    site("aaa", "aaa", GOOD.replace("good", "torch"))
    plugins = load_plugins()
    assert plugins.backends.entry("torch").source.distribution == "memlayer-lm"
    assert [item.source.distribution for item in plugins.loaded][-1] == "aaa"


def test_the_environment_variable_chooses_among_installed_plugins(site, monkeypatch):
    site("good-search", "good_search", GOOD)
    site("other-search", "other_search", GOOD.replace("good", "other"))
    monkeypatch.setenv("MEMLAYER_PLUGINS", "Good_Search, missing-search")
    plugins = load_plugins()
    assert "good" in plugins.backends.names()
    assert "torch" in plugins.backends.names()
    assert "other" not in plugins.backends.names()
    assert reasons(plugins) == [
        "MEMLAYER_PLUGINS names 'missing-search', and no such distribution has plug-ins; known: "
        "good-search, memlayer-lm, other-search"
    ]


def test_an_empty_environment_variable_leaves_the_built_ins(site, monkeypatch):
    site("broken", "broken_plugin", BROKEN_IMPORT)
    monkeypatch.setenv("MEMLAYER_PLUGINS", "")
    plugins = load_plugins()
    assert plugins.failures == []
    assert "torch" in plugins.backends.names()


def test_plugins_of_a_fresh_process_load_in_the_same_order(site):
    folder = site("zeta", "zeta_search", GOOD.replace("good", "zeta"))
    site("alpha", "alpha_search", GOOD.replace("good", "alpha"))
    code = (
        "import json; from memlayer.plugins import load_plugins; "
        "print(json.dumps([p.source.plugin for p in load_plugins().loaded]))"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    orders = [
        json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment))
        for _ in range(2)
    ]
    expected = ["adapters", "backends", "tasks", "alpha_search", "zeta_search"]
    assert orders[0] == orders[1] == expected


def test_loading_plugins_imports_no_library_they_name(site):
    code = (
        "import sys; from memlayer.plugins import load_plugins; load_plugins(); "
        "print([m for m in ('torch', 'transformers', 'faiss', 'hnswlib', 'typer') "
        "if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_one_object_cannot_be_loaded_twice():
    plugin = Named("a")
    plugins = only(plugin, plugin)
    assert reasons(plugins) == ["plug-in 'Named' is the same object as a plug-in loaded before"]


def test_two_plugins_of_one_class_are_two_plugins():
    plugins = only(Named("a"), Named("b"))
    assert plugins.backends.names() == ["a", "b"]
    assert plugins.failures == []


def test_a_module_can_be_a_plugin():
    module = ModuleType("module_plugin")
    module.register_backends = hookimpl(lambda register: register("a", "collections:Counter"))
    plugins = only(module)
    assert plugins.failures == []
    assert plugins.backends.entry("a").source.plugin == "module_plugin"


def test_an_unhashable_plugin_is_reported_and_stops_no_other():
    class Unhashable(Named):
        __hash__ = None

    plugins = only(Unhashable("a"), Named("b"))
    assert reasons(plugins) == ["TypeError: unhashable type: 'Unhashable'"]
    assert plugins.backends.names() == ["b"]


@pytest.mark.parametrize("name", ["", "Faiss", "a b", "-a", "a.b", "ä"])
def test_a_name_that_is_no_name_is_refused(name):
    assert reasons(only(Named(name, "fine"))) == [
        f"a name has lower-case letters, digits, - and _ only, got {name!r}"
    ]


def test_a_bad_name_leaves_the_plugins_other_names():
    assert only(Named("first", "Bad", "last")).backends.names() == ["first", "last"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"requires": "faiss"}, "requires of 'a' must be a sequence of names, got 'faiss'"),
        (
            {"requires": ("faiss.contrib",)},
            "requires of 'a' must be top-level import names, got 'faiss.contrib'",
        ),
        (
            {"model_types": ("gpt2",)},
            "adapters, and only they, have model_types; backend 'a' of plug-in 'Named' has "
            "['gpt2']",
        ),
    ],
    ids=["a string", "a submodule", "model types of a backend"],
)
def test_a_wrong_registration_names_what_is_wrong(options, reason):
    assert reasons(only(Named("a", **options))) == [reason]


def test_a_target_without_attribute_is_refused():
    class Plugin:
        @hookimpl
        def register_tasks(self, register: Register) -> None:
            register("a", "collections")

    assert reasons(only(Plugin())) == [
        "the target of 'a' must be 'module:Attribute', got 'collections'"
    ]


def test_get_imports_what_a_name_stands_for():
    from collections import OrderedDict

    assert only(Named("a")).backends.get("a") is OrderedDict


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        only(Named("faiss", "torch")).backends.get("fais")
    assert str(caught.value) == (
        "unknown backend 'fais'; known: faiss, torch. Did you mean 'faiss'?"
    )


def test_an_unknown_name_near_an_unavailable_one_says_how_to_install_that(site):
    site("good-search", "good_search", GOOD)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'good'\? It needs .*\[fast\]\"$"):
        load_plugins().backends.get("goood")


def test_an_unknown_name_points_at_the_plugins_that_failed():
    with pytest.raises(UnknownNameError) as caught:
        only(Named("Bad", "fine")).backends.get("zzz")
    assert str(caught.value) == (
        "unknown backend 'zzz'; known: fine. Plug-ins that failed: 1; see 'memlayer plugins'."
    )


def test_a_missing_library_makes_a_name_unavailable_with_the_install_command(site):
    site("good-search", "good_search", GOOD)
    backends = load_plugins().backends
    reason = (
        "needs the Python package no_such_library, which is not installed: "
        'pip install "good-search[fast]"'
    )
    assert backends.unavailable_reason("good") == reason
    with pytest.raises(BackendUnavailableError) as caught:
        backends.get("good")
    assert str(caught.value) == f"backend 'good' {reason}"


class Deviceless:
    @classmethod
    def unavailable_reason(cls) -> str | None:
        return "there is no such device"


class Confused:
    @classmethod
    def unavailable_reason(cls) -> str | None:
        raise OSError("cannot look")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("collections:OrderedDict", None),
        ("targets:Deviceless", "there is no such device"),
        ("targets:Confused", "its own check failed: OSError: cannot look"),
    ],
)
def test_a_class_can_say_why_it_cannot_run_here(monkeypatch, target, reason):
    module = ModuleType("targets")
    module.Deviceless, module.Confused = Deviceless, Confused
    monkeypatch.setitem(sys.modules, "targets", module)

    class Plugin:
        @hookimpl
        def register_backends(self, register: Register) -> None:
            register("a", target)

    assert only(Plugin()).backends.unavailable_reason("a") == reason


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("no_such_module_anywhere:Thing", "ModuleNotFoundError"),
        ("collections:NoSuchThing", "AttributeError"),
    ],
)
def test_a_target_that_cannot_be_imported_names_the_plugin(target, error):
    class Plugin:
        @hookimpl
        def register_backends(self, register: Register) -> None:
            register("a", target)

    backends = only(Plugin()).backends
    with pytest.raises(PluginError) as caught:
        backends.get("a")
    message = str(caught.value)
    assert message.startswith(
        f"backend 'a' of plug-in 'Plugin' cannot be imported from {target}: {error}: "
    )
    assert backends.unavailable_reason("a") == message
