"""A server's problem documents as errors of ours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from eagle_target.errors import (
    AdapterError,
    ConnectError,
    ContractError,
    EagleTargetError,
    Overloaded,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    Unavailable,
    VocabMappingError,
)
from eagle_target.protocol import PROBLEM_URN, read_count

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN_ERRORS: dict[str, type[EagleTargetError]] = {
    "contract": ContractError,
    "invalid-vocab-mapping": VocabMappingError,
    "malformed-body": ProtocolError,
    "transport-refused": ConnectError,
    "engine-failed": AdapterError,
}
SERVER_ERRORS: dict[str, type[ServerError]] = {
    "queue-full": Overloaded,
    "loading": Unavailable,
    "degraded": Unavailable,
    "draining": Unavailable,
    "failed": Unavailable,
    "closed": Unavailable,
    "body-too-large": RequestTooLarge,
    "too-many-tokens": RequestTooLarge,
    "too-many-sequences": RequestTooLarge,
    "sequence-too-long": RequestTooLarge,
    "mapping-too-large": RequestTooLarge,
    "headers-too-large": RequestTooLarge,
    "too-many-connections": Overloaded,
}


def error_of(url: str, status: int, headers: Mapping[str, str], body: bytes) -> EagleTargetError:
    """The error for an answer of status 300 and up; something between the server and us may have answered, too."""
    try:
        document = json.loads(body)
        name = str(document["type"]).removeprefix(PROBLEM_URN)
        detail = str(document["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        name, detail = "http", f"status {status}: {body[:200].decode('utf-8', 'replace') or 'no body'}"
    message = f"{url}: {detail}"
    if name in PLAIN_ERRORS:
        return PLAIN_ERRORS[name](message)
    retry_after = read_count(headers.get("Retry-After", ""))
    kind = SERVER_ERRORS.get(name, Unavailable if status in (502, 503, 504) else ServerError)
    return kind(message, status=status, problem=name, retry_after=None if retry_after is None else float(retry_after))
