"""Options of plugins: declared as pydantic models, given as `key=value` or in YAML."""

from __future__ import annotations

import difflib
import json
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo

Model = TypeVar("Model", bound=BaseModel)


class PluginOptions(BaseModel):
    """Base of every plugin's options; each field carries a description."""

    # On a command line a revision of digits only looks like a number.
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


def parse_assignments(assignments: Iterable[str], flag: str) -> dict[str, Any]:
    """Read `key=value` strings; values as `parse_value` reads them.

    Raises:
        ConfigError: no `=`.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{flag} {assignment!r} is not of the form key=value")
        values[key.strip()] = parse_value(text)
    return values


def parse_value(text: str) -> Any:
    """Read one value: JSON where it is JSON, else the text itself; nothing at all is null.

    YAML would turn a revision into a date and `1:30` into 90. A number that would be spelt otherwise, such as
    `1.10` or `4e12`, stays text: a revision may look like that, and validation reads numbers from text.
    """
    text = text.strip()
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, int | float) and json.dumps(value) != text else value


def build_model(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Validate values into a model, with messages for people.

    Raises:
        ConfigError: every wrong value, where it stands, and the nearest name of an unknown key.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(detail, model) for detail in error.errors()]
        raise ConfigError(f"{what}: " + "; ".join(lines)) from error


def is_secret(field: FieldInfo) -> bool:
    """Whether a setting must not be shown, nor be given where others see it."""
    return SecretStr in (field.annotation, *typing.get_args(field.annotation))


def nearest_name(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest of the names, else the list of them."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _describe(detail: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown option {where!r}, {nearest_name(str(detail['loc'][-1]), _names_at(model, detail['loc'][:-1]))}"
    if detail["type"] == "missing":
        return f"{where!r} is required"
    field = model.model_fields.get(str(detail["loc"][0])) if detail["loc"] else None
    if field is not None and is_secret(field):
        return f"{where!r}: {detail['msg']}"
    return f"{where!r}: {detail['msg']}, got {detail['input']!r}"


def _names_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
