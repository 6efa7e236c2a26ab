"""`GET /`: a page for a browser that says how the server is. It loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse, Response

from eagle_target.server.status.markup import Markup, element, join, void
from eagle_target.server.status.report import gather
from eagle_target.server.status.sections import sections

if TYPE_CHECKING:
    from starlette.requests import Request

    from eagle_target.config import ServerConfig
    from eagle_target.server.channels import Channels
    from eagle_target.server.engine.server import TargetModelServer
    from eagle_target.server.metrics import Metrics
    from eagle_target.server.status.report import Report

RELOAD_SECONDS = 10


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
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("link", rel="icon", href="data:,"),
        element("noscript", void("meta", http_equiv="refresh", content=RELOAD_SECONDS)),
        element("title", f"{report.state}: {report.model}"),
        element("style", _asset("status.css")),
    )
    body = element("body", element("main", sections(report)), element("script", _asset("status.js")))
    return "<!doctype html>\n" + join(element("html", head, body, lang="en"))


@cache
def page_headers() -> dict[str, str]:
    """Headers under which a browser runs nothing but what is ours and asks nobody but us."""
    policy = (
        "default-src 'none'",
        f"style-src '{_digest('status.css')}'",
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


@cache
def _asset(name: str) -> Markup:
    return Markup(files("eagle_target.server").joinpath("assets", name).read_text(encoding="utf-8"))


def _digest(name: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(_asset(name).encode()).digest()).decode()
