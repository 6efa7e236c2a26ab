"""`eagle-target serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eagle_target.cli.settings import given_settings, read_transport_options, settings_flags
from eagle_target.config import ServerConfig, dump_config, load_config
from eagle_target.plugins.options import build_model, parse_assignments
from eagle_target.plugins.registry import load_plugins

if TYPE_CHECKING:
    from eagle_target.plugins.registry import Plugins


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings; flags win over it.")
@settings_flags(ServerConfig, {"transports": "--transport"})
@click.option("-o", "engine_option", multiple=True, metavar="KEY=VALUE", help="Option of the engine; repeatable.")
@click.option(
    "-t", "transport_option", multiple=True, metavar="NAME.KEY=VALUE", help="Option of a transport; repeatable."
)
@click.option("--print-config", is_flag=True, help="Print the settings as YAML and stop.")
def serve(
    config: Path | None,
    engine_option: tuple[str, ...],
    transport_option: tuple[str, ...],
    print_config: bool,
    **flags: Any,
) -> None:
    """Serve a target's supervision over HTTP until SIGTERM.

    Settings come from the --config file, then EAGLE_TARGET_* variables, then flags; the later wins.
    """
    overrides = given_settings(flags)
    if engine_option:
        overrides["engine_options"] = parse_assignments(engine_option, "-o")
    if transport_option:
        overrides["transport_options"] = read_transport_options(transport_option)
    settings = load_config(ServerConfig, path=config, environment=os.environ, overrides=overrides)
    filled = fill_engine_options(settings, load_plugins())
    if print_config:
        click.echo(dump_config(filled), nl=False)
        return
    from eagle_target.server.log import configure_logging
    from eagle_target.server.run import HttpServer

    configure_logging(settings.log_format, settings.log_level)
    HttpServer(settings).run()


def fill_engine_options(settings: ServerConfig, plugins: Plugins) -> ServerConfig:
    """Check the engine's options and fill in the defaults, to be shown; secrets are masked.

    Raises:
        PluginError: the engine is not installed. ConfigError: an option is wrong.
    """
    adapter = plugins.adapters.get(settings.engine)
    options = build_model(adapter.options_model, settings.engine_options, f"options of engine {settings.engine!r}")
    return settings.model_copy(update={"engine_options": options.model_dump(mode="json")})
