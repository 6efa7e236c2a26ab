"""The plugin: what it registers. Imports neither torch nor the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins import Adapter, Transport


@hookimpl
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Register the adapter."""
    from eagle_target_toy.adapter import ToyAdapter

    register(ToyAdapter)


@hookimpl
def register_transports(register: Callable[[type[Transport]], None]) -> None:
    """Register the transport."""
    from eagle_target_toy.transport import ToyFileTransport

    register(ToyFileTransport)
