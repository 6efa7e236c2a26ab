"""`eagle-target plugins`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from eagle_target.errors import PluginError
from eagle_target.plugins.options import nearest_name
from eagle_target.plugins.registry import load_plugins, unusable_reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.adapter import Adapter
    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.registry import Origin, Plugins, Registry
    from eagle_target.plugins.transport import Transport

Row = tuple[str, str, str, str, str]


@click.command()
@click.option("--options", "name", metavar="NAME", help="Describe the options of one engine or transport.")
def plugins(name: str | None) -> None:
    """List engines and transports, and whether they can be used here."""
    found = load_plugins()
    console = Console(width=None if Console().is_terminal else 140, highlight=False, markup=False)
    if name is not None:
        console.print(options_table(_find(found, name).options_model, name))
        return
    table = Table("kind", "name", "version", "from", "usable here", box=None, pad_edge=False)
    for row in [*_installed_rows(found), *_absent_rows(found)]:
        table.add_row(*row)
    for broken in found.broken:
        table.add_row("plugin", broken.name, "-", broken.distribution, f"no: broken: {broken.reason}")
    console.print(table)


def options_table(model: type[PluginOptions], name: str) -> Table:
    """The options of a plugin: name, type, default, description."""
    table = Table("option", "type", "default", "description", box=None, pad_edge=False, title=f"options of {name}")
    for option, field in model.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
        kind = str(field.annotation).replace("typing.", "") if kind in ("Literal", "Union", "Optional") else kind
        default = (
            "required" if field.is_required() else str(field.get_default(call_default_factory=True, validated_data={}))
        )
        table.add_row(option, kind, default, field.description or "")
    return table


def _installed_rows(found: Plugins) -> list[Row]:
    rows: list[tuple[str, Origin[Adapter] | Origin[Transport], Callable[[], str | None]]] = [
        *(("engine", origin, origin.plugin.engine_version) for origin in found.adapters),
        *(("transport", origin, origin.plugin.version) for origin in found.transports),
    ]
    return [
        (
            kind,
            origin.plugin.name,
            _version(version),
            f"{origin.distribution} {origin.version}",
            _usable(unusable_reason(origin.plugin)),
        )
        for kind, origin, version in rows
    ]


def _absent_rows(found: Plugins) -> list[Row]:
    return [
        (kind, name, "-", "-", f"no: {name} is not installed: pip install {distribution}")
        for kind, registry in (("engine", found.adapters), ("transport", found.transports))
        for name, distribution in _missing(registry)
    ]


def _missing(registry: Registry[Adapter] | Registry[Transport]) -> list[tuple[str, str]]:
    return [(name, distribution) for name, distribution in registry.known.items() if name not in registry.origins]


def _version(ask: Callable[[], str | None]) -> str:
    try:
        return ask() or "-"
    except Exception:  # noqa: BLE001 - a stranger's plugin may fail in any way, its row says so
        return "?"


def _usable(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def _find(found: Plugins, name: str) -> type[Adapter] | type[Transport]:
    if name in found.adapters.origins:
        return found.adapters.get(name)
    if name in found.transports.origins:
        return found.transports.get(name)
    near = nearest_name(name, [*found.adapters.origins, *found.transports.origins])
    raise PluginError(f"no engine or transport {name!r} is installed, {near}")
