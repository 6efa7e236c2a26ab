"""Command-line flags made from the settings' models, so that flags, YAML and help cannot differ."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic_core import PydanticUndefined

from eagle_target.config import ClientConfig
from eagle_target.errors import ConfigError
from eagle_target.plugins.options import is_secret, parse_assignments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

ACCESS = ("token_file", "ca_file", "client_cert", "client_key")
SCALARS: dict[Any, Any] = {bool: bool, int: int, float: float, Path: click.Path(path_type=Path)}


def settings_flags(model: type[BaseModel], rename: Mapping[str, str]) -> Callable[[Any], Any]:
    """Decorate a command with a `--flag` for every plain field of a model.

    Args:
        rename: flags whose name is not the field's, by field. Mappings get none: `-o` and `-t` are theirs;
            nor do secrets, which others would see in the list of processes.
    """

    def decorate(command: Any) -> Any:
        for name, field in reversed(model.model_fields.items()):
            if not _is_mapping(field) and not is_secret(field):
                flag = "--" + name.replace("_", "-")
                command = click.option(
                    rename.get(name, flag),
                    name,
                    is_flag=field.annotation is bool,
                    type=_click_type(field),
                    default=None,
                    help=_help(field),
                )(command)
        return command

    return decorate


def access_flags(command: Any) -> Any:
    """Decorate a command that asks servers with flags for who it is and whom it trusts; they go to `from_urls`."""
    for name in reversed(ACCESS):
        field = ClientConfig.model_fields[name]
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, name, type=click.Path(path_type=Path), help=_help(field))(command)
    return command


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as settings."""
    return {name: value for name, value in values.items() if value is not None}


def read_transport_options(assignments: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Read `transport.key=value` flags into options by transport name.

    Raises:
        ConfigError: not of that form.
    """
    options: dict[str, dict[str, Any]] = {}
    for name, value in parse_assignments(assignments, "-t").items():
        transport, _, key = name.partition(".")
        if not transport or not key:
            raise ConfigError(f"-t {name!r} names no option of a transport: NAME.KEY=VALUE is expected")
        options.setdefault(transport, {})[key] = value
    return options


def _is_mapping(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is dict


def _click_type(field: FieldInfo) -> Any:
    annotation = field.annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return click.Choice(typing.get_args(annotation))
    return SCALARS.get(annotation, str)


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return f"{field.description} Required, here or in a settings file."
    if default in (None, ()):
        return field.description or ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{field.description} [default: {shown}]"
