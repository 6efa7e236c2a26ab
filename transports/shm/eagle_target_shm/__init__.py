"""The `shm` transport: tensors in memory that a client on the same host maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.transport import Transport


@hookimpl
def register_transports(register: Callable[[type[Transport]], None]) -> None:
    """Register the transport."""
    from eagle_target_shm.transport import ShmTransport

    register(ShmTransport)
