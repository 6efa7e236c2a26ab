"""Finds adapters and transports: ours and anybody's, through the entry-point group `eagle_target`."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

import pluggy

from eagle_target.errors import PluginError
from eagle_target.plugins import hookspecs
from eagle_target.plugins.adapter import Adapter
from eagle_target.plugins.options import nearest_name
from eagle_target.plugins.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

# Distributions of this project that a user may not have installed.
KNOWN_ADAPTERS = {
    "hf": "eagle-target-hf",
    "sglang": "eagle-target-sglang",
    "vllm": "eagle-target-vllm",
}
KNOWN_TRANSPORTS: dict[str, str] = {}

Plugin = TypeVar("Plugin", Adapter, Transport)


@dataclass(frozen=True, slots=True)
class Origin(Generic[Plugin]):
    """A registered class and the distribution it comes from."""

    plugin: type[Plugin]
    distribution: str
    version: str


@dataclass(frozen=True, slots=True)
class BrokenPlugin:
    """A plugin that could not be loaded, and why."""

    name: str
    distribution: str
    reason: str


@dataclass(slots=True)
class Registry(Generic[Plugin]):
    """The registered classes of one kind, by name."""

    kind: str
    known: dict[str, str]
    origins: dict[str, Origin[Plugin]] = field(default_factory=dict)

    def add(self, plugin: type[Plugin], distribution: str, version: str) -> None:
        """Register a class.

        Raises:
            PluginError: the name is taken; both classes and their distributions are named.
        """
        taken = self.origins.get(plugin.name)
        if taken is not None and taken.plugin is not plugin:
            raise PluginError(
                f"two {self.kind}s are called {plugin.name!r}: {_path(taken.plugin)} of {taken.distribution} and "
                f"{_path(plugin)} of {distribution}: uninstall one"
            )
        self.origins[plugin.name] = Origin(plugin, distribution, version)

    def get(self, name: str) -> type[Plugin]:
        """Return the class of a name.

        Raises:
            PluginError: nothing is registered under it, with the way to install it where that is known.
        """
        if name in self.origins:
            return self.origins[name].plugin
        if name in self.known:
            raise PluginError(f"{self.kind} {name!r} is not installed: pip install {self.known[name]}")
        raise PluginError(f"there is no {self.kind} {name!r}, {nearest_name(name, {*self.origins, *self.known})}")

    def __iter__(self) -> Iterator[Origin[Plugin]]:
        return iter(sorted(self.origins.values(), key=lambda origin: origin.plugin.name))


@dataclass(slots=True)
class Plugins:
    """Everything that is registered, and what is broken."""

    adapters: Registry[Adapter] = field(default_factory=lambda: Registry("adapter", KNOWN_ADAPTERS))
    transports: Registry[Transport] = field(default_factory=lambda: Registry("transport", KNOWN_TRANSPORTS))
    broken: list[BrokenPlugin] = field(default_factory=list)


@cache
def load_plugins() -> Plugins:
    """Load every installed plugin, once a process. A broken one is reported by name and left out.

    Raises:
        PluginError: two plugins register the same name.
    """
    plugins = Plugins()
    for entry_point in sorted(importlib.metadata.entry_points(group=hookspecs.PROJECT), key=lambda entry: entry.name):
        distribution = entry_point.dist
        name, version = (distribution.name, distribution.version) if distribution else ("unknown", "0")
        try:
            adapters, transports = call_hooks(entry_point.load())
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's plugin may fail in any way
            reason = f"{type(error).__name__}: {error}"
            logger.warning("plugin %s of %s is broken and left out: %s", entry_point.name, name, reason)
            plugins.broken.append(BrokenPlugin(entry_point.name, name, reason))
            continue
        for adapter in adapters:
            plugins.adapters.add(adapter, name, version)
        for transport in transports:
            plugins.transports.add(transport, name, version)
    return plugins


def call_hooks(module: object) -> tuple[list[type[Adapter]], list[type[Transport]]]:
    """Run the hooks of one plugin and return the classes they register.

    Raises:
        pluggy.PluginValidationError: a hook is misspelt or takes other arguments.
        TypeError: something registered is no class of the kind, or has no name.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.check_pending()
    adapters: list[type[Adapter]] = []
    transports: list[type[Transport]] = []
    manager.hook.register_adapters(register=adapters.append)
    manager.hook.register_transports(register=transports.append)
    for registered, kind in ((adapters, Adapter), (transports, Transport)):
        for plugin in registered:
            _check_class(plugin, kind)
    return adapters, transports


def unusable_reason(plugin: type[Adapter] | type[Transport]) -> str | None:
    """Why an adapter or transport cannot work here; a plugin that fails at telling is broken."""
    try:
        return plugin.unusable_reason()
    except Exception as error:  # noqa: BLE001 - a stranger's plugin may fail in any way
        return f"broken: {type(error).__name__}: {error}"


def _check_class(plugin: object, kind: type[object]) -> None:
    if not isinstance(plugin, type) or not issubclass(plugin, kind):
        raise TypeError(f"{plugin!r} is registered, which is no subclass of {_path(kind)}")
    if not isinstance(getattr(plugin, "name", None), str):
        raise TypeError(f"{_path(plugin)} has no name")


def _path(plugin: type[object]) -> str:
    return f"{plugin.__module__}.{plugin.__qualname__}"
