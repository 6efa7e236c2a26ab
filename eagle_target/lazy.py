"""Names of a package that are loaded on first use, so that importing it imports neither torch nor an engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def load_name(package: str, homes: Mapping[str, str], name: str, *, root: str | None = None) -> Any:
    """Load a name of a package; with the first two bound it is the package's `__getattr__`.

    Args:
        homes: the module of each name, relative to `root`, which is the package where it is not given.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{root or package}.{homes[name]}"), name)
