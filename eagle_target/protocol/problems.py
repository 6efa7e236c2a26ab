"""Every problem a server answers (RFC 9457), as both ends spell it: its name, its status, and the error it is."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from eagle_target.errors import (
    AdapterError,
    ConnectError,
    ContractError,
    EagleTargetError,
    Overloaded,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    TransportError,
    Unavailable,
    VocabMappingError,
)
from eagle_target.protocol.messages import read_count

if TYPE_CHECKING:
    from collections.abc import Mapping

MEDIA_TYPE = "application/problem+json"
URN = "urn:eagle-target:problem:"
# What something between a client and a server answers while the server is away.
AWAY = (502, 503, 504)


class ProblemType(StrEnum):
    """The last part of a problem's `type`.

    status: of the HTTP answer. kind: the error that a server answers with it, and that a client raises for it.
    """

    status: int
    kind: type[EagleTargetError]

    def __new__(cls, name: str, status: int, kind: type[EagleTargetError]) -> Self:
        """A member: a string with two facts."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.status = status
        member.kind = kind
        return member

    # The first that an error is an instance of is its own: the narrower before the wider.
    INVALID_VOCAB_MAPPING = "invalid-vocab-mapping", 422, VocabMappingError
    CONTRACT = "contract", 422, ContractError
    MALFORMED_BODY = "malformed-body", 400, ProtocolError
    TRANSPORT_REFUSED = "transport-refused", 409, ConnectError
    TRANSPORT_FAILED = "transport-failed", 500, TransportError
    ENGINE_FAILED = "engine-failed", 500, AdapterError

    UNKNOWN_VOCAB_MAPPING = "unknown-vocab-mapping", 409, ServerError
    UNKNOWN_CHANNEL = "unknown-channel", 409, ServerError
    TRANSPORT_NOT_OFFERED = "transport-not-offered", 409, ServerError
    UNAUTHORIZED = "unauthorized", 401, ServerError
    NOT_FOUND = "not-found", 404, ServerError
    METHOD_NOT_ALLOWED = "method-not-allowed", 405, ServerError
    BODY_TIMEOUT = "body-timeout", 408, ServerError
    LENGTH_REQUIRED = "length-required", 411, ServerError
    # nginx's status for a client that went away; nobody reads it, the metrics count it.
    CLIENT_GONE = "client-gone", 499, ServerError
    HTTP = "http", 500, ServerError
    INTERNAL = "internal", 500, ServerError

    BODY_TOO_LARGE = "body-too-large", 413, RequestTooLarge
    TOO_MANY_TOKENS = "too-many-tokens", 413, RequestTooLarge
    TOO_MANY_SEQUENCES = "too-many-sequences", 413, RequestTooLarge
    SEQUENCE_TOO_LONG = "sequence-too-long", 413, RequestTooLarge
    MAPPING_TOO_LARGE = "mapping-too-large", 413, RequestTooLarge
    ANSWER_TOO_LARGE = "answer-too-large", 413, RequestTooLarge
    HEADERS_TOO_LARGE = "headers-too-large", 431, RequestTooLarge

    QUEUE_FULL = "queue-full", 503, Overloaded
    TOO_MANY_CONNECTIONS = "too-many-connections", 503, Overloaded
    TOO_MANY_CHANNELS = "too-many-channels", 503, Unavailable

    # The states of a server that is not ready.
    LOADING = "loading", 503, Unavailable
    DEGRADED = "degraded", 503, Unavailable
    STUCK = "stuck", 503, Unavailable
    DRAINING = "draining", 503, Unavailable
    FAILED = "failed", 503, Unavailable
    CLOSED = "closed", 503, Unavailable

    @classmethod
    def named(cls, name: str) -> ProblemType:
        """The problem of a name; `http` for one that is none of ours."""
        return next((problem for problem in cls if problem == name), cls.HTTP)

    def error(self, message: str, *, retry_after: float | None = None) -> EagleTargetError:
        """The error to raise: what was wrong, the value and what to do; seconds to wait, if that helps."""
        if issubclass(self.kind, ServerError):
            return self.kind(message, status=self.status, problem=self, retry_after=retry_after)
        return self.kind(message)


def problem_type(error: Exception) -> ProblemType:
    """What an error is answered as; `internal` for one that is none of ours."""
    if isinstance(error, ServerError):
        return ProblemType.named(error.problem)
    kinds = (problem for problem in ProblemType if isinstance(error, problem.kind))
    return next(kinds, ProblemType.INTERNAL)


def problem_document(problem: ProblemType, detail: str, *, status: int, retry_after: float | None) -> dict[str, Any]:
    """The JSON body of a problem."""
    document = {"type": URN + problem, "title": problem.replace("-", " "), "status": status, "detail": detail}
    return document if retry_after is None else {**document, "retry_after": retry_after}


def read_problem(url: str, status: int, headers: Mapping[str, str], body: bytes) -> EagleTargetError:
    """The error for an answer of status 300 and up; something between the server and us may have answered, too."""
    try:
        document = json.loads(body)
        name = str(document["type"]).removeprefix(URN)
        detail = str(document["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        name, detail = "http", f"status {status}: {body[:200].decode('utf-8', 'replace') or 'no body'}"
    problem = ProblemType.named(name)
    kind = Unavailable if problem is ProblemType.HTTP and status in AWAY else problem.kind
    message = f"{url}: {detail}"
    if not issubclass(kind, ServerError):
        return kind(message)
    retry_after = read_count(headers.get("Retry-After", ""))
    return kind(message, status=status, problem=name, retry_after=None if retry_after is None else float(retry_after))
