"""The hooks a plugin may implement. See docs/plugins.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.adapter import Adapter
    from eagle_target.plugins.transport import Transport

PROJECT = "eagle_target"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Call `register` with each adapter class of the plugin."""


@hookspec
def register_transports(register: Callable[[type[Transport]], None]) -> None:
    """Call `register` with each transport class of the plugin."""
