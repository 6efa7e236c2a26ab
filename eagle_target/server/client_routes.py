"""The routes by which a client says that it is there, and that it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from eagle_target import protocol
from eagle_target.server.bodies import CheckedJson
from eagle_target.server.presence import MAX_CLIENT_LETTERS, address_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from eagle_target.server.presence import Presences


def client_routes(presences: Presences) -> list[Route]:
    """Renew and end a client's presence."""

    async def renew(request: Request) -> Response:
        presences.hear(_client_of(request), address_of(request.scope))
        return CheckedJson({"lease_seconds": presences.lease})

    async def leave(request: Request) -> Response:
        presences.leave(_client_of(request))
        return Response(status_code=204)

    path = protocol.CLIENTS + "/{client}"
    return [Route(path, renew, methods=["PUT"]), Route(path, leave, methods=["DELETE"])]


def _client_of(request: Request) -> str:
    return str(request.path_params["client"])[:MAX_CLIENT_LETTERS]
