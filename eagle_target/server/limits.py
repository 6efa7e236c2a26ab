"""What one request may have; connections have their limits in `connections`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.errors import RequestTooLarge
from eagle_target.server.bodies import read_body

if TYPE_CHECKING:
    from starlette.requests import Request

    from eagle_target.config import ServerConfig
    from eagle_target.supervision import SupervisionRequest


def check_size(request: SupervisionRequest, config: ServerConfig) -> None:
    """Hold a request to the server's limits.

    Raises:
        RequestTooLarge: too many tokens, too many sequences, or one that is too long.
    """
    # Lengths that do not add up to the tokens are told as such, later.
    longest = min(max(request.seq_lens, default=0), request.tokens)
    limits = (
        ("too-many-tokens", "tokens", request.tokens, "max_request_tokens"),
        ("too-many-sequences", "sequences", len(request.seq_lens), "max_sequences"),
        ("sequence-too-long", "tokens in a sequence", longest, "max_sequence_tokens"),
    )
    for problem, what, count, setting in limits:
        most = getattr(config, setting)
        if count > most:
            raise RequestTooLarge(
                f"the request has {count} {what}, this server takes {most}: send fewer, or raise {setting}",
                status=413,
                problem=problem,
            )


async def read_mapping_body(request: Request, config: ServerConfig) -> memoryview:
    """Read a vocabulary mapping's body.

    Raises:
        RequestTooLarge: more than `max_mapping_bytes` were announced. ServerError: see `read_body`.
    """
    return await read_body(
        request,
        limit=config.max_mapping_bytes,
        timeout=config.body_timeout,
        problem="mapping-too-large",
        setting="max_mapping_bytes",
    )
