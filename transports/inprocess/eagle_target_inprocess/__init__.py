"""The `inprocess` transport: tensors handed over by reference, for a server in the client's own process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.transport import Transport


@hookimpl
def register_transports(register: Callable[[type[Transport]], None]) -> None:
    """Register the transport."""
    from eagle_target_inprocess.transport import InProcessTransport

    register(InProcessTransport)
