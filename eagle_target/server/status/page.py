"""`GET /`: a page for a browser that says how the server is. It loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse, Response

from eagle_target.server.recent import SAMPLE_SECONDS, SAMPLES, STAGES
from eagle_target.server.status.environment import asset, environment
from eagle_target.server.status.report import gather

if TYPE_CHECKING:
    from starlette.requests import Request

    from eagle_target.config import ServerConfig
    from eagle_target.server.channels import Channels
    from eagle_target.server.engine.server import TargetModelServer
    from eagle_target.server.metrics import Metrics
    from eagle_target.server.status.report import Report

RELOAD_SECONDS = 10
MAX_CLIENTS = 100


class StatusPage:
    """The page of one server."""

    def __init__(self, server: TargetModelServer, channels: Channels, metrics: Metrics, config: ServerConfig) -> None:
        self._server = server
        self._channels = channels
        self._metrics = metrics
        self._config = config

    async def show(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """The page as of now."""
        report = gather(self._server, self._channels, self._metrics, self._config)
        return HTMLResponse(render(report), headers=page_headers())


def render(report: Report) -> str:
    """The whole page; without scripts the browser loads it anew, with them its content is exchanged in place."""
    return (
        environment()
        .get_template("status/status.html")
        .render(
            report=report,
            script=asset("status.js"),
            reload_seconds=RELOAD_SECONDS,
            max_clients=MAX_CLIENTS,
            sample_seconds=SAMPLE_SECONDS,
            window=SAMPLES * SAMPLE_SECONDS,
            stages=STAGES,
        )
    )


@cache
def page_headers() -> dict[str, str]:
    """Headers under which a browser runs nothing but what is ours and asks nobody but us."""
    policy = (
        "default-src 'none'",
        f"style-src '{_digest('style.css')}'",
        f"script-src '{_digest('status.js')}'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def _digest(name: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(asset(name).encode()).digest()).decode()
