"""What a client holds a request to before it is sent, and an answer before its tensors are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.errors import ProtocolError, RequestTooLarge

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.protocol import Limits
    from eagle_target.supervision import SupervisionRequest


def check_answer(url: str, given: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare an answer's headers, or what came with its tensors, with what was asked for.

    Raises:
        ProtocolError: it is another request's, or of another target or mapping.
    """
    for name, value in expected.items():
        if given.get(name) != value:
            raise ProtocolError(
                f"{url} answered with {name} {given.get(name)!r}, expected {value!r}: "
                "it answered another request, or was restarted with another target"
            )


def check_limits(url: str, request: SupervisionRequest, limits: Limits) -> None:
    """Refuse a request that a server said it does not take.

    Raises:
        RequestTooLarge: too many tokens, or too large a body.
    """
    size = 9 * request.tokens + 8 * len(request.seq_lens) + 1024
    if request.tokens > limits.max_request_tokens or size > limits.max_body_bytes:
        raise RequestTooLarge(
            f"the batch has {request.tokens} tokens, {url} takes {limits.max_request_tokens} and bodies of "
            f"{limits.max_body_bytes} bytes: use a smaller batch, or raise its limits",
            status=413,
            problem="too-many-tokens",
        )
