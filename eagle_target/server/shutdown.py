"""When a server ends by itself: not used for a while, or left by its only client."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from eagle_target.server.engine.lifecycle import SERVING_STATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.config import ServerConfig
    from eagle_target.server.engine.server import TargetModelServer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1


class UnusedWatch:
    """Drains a server that nobody uses any more, where its settings say so.

    Args:
        server: whose clients count. config: its settings. active: gives the requests under way.
        drain: ends the server in order.
    """

    def __init__(
        self,
        server: TargetModelServer,
        config: ServerConfig,
        *,
        active: Callable[[], int],
        drain: Callable[[], None],
    ) -> None:
        self._server = server
        self._idle_seconds = config.exit_when_idle
        self._on_disconnect = config.exit_on_disconnect
        self._active = active
        self._drain = drain
        self._used_at = time.monotonic()

    async def run(self) -> None:
        """Look until it is time to end."""
        while self._on_disconnect or self._idle_seconds is not None:
            reason = self._reason_to_end()
            if reason is not None:
                logger.info("draining: %s", reason)
                self._drain()
                return
            await asyncio.sleep(POLL_SECONDS)

    def _reason_to_end(self) -> str | None:
        clients = self._server.clients.count()
        if self._on_disconnect and self._server.clients.most_at_a_time > 1:
            logger.warning("a second client is connected: exit_on_disconnect is for a single one and is off now")
            self._on_disconnect = False
        if self._on_disconnect and self._server.clients.most_at_a_time == 1 and not clients:
            return "the only client is gone (exit_on_disconnect)"
        # A server that loads is not idle, and neither is one whose engine is loaded again.
        if clients or self._active() or self._server.state not in SERVING_STATES:
            self._used_at = time.monotonic()
        elif self._idle_seconds is not None and time.monotonic() - self._used_at >= self._idle_seconds:
            return f"no client and no request for {self._idle_seconds:g} s (exit_when_idle)"
        return None
