"""Every problem is the same error at both ends, and documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle_target.errors import (
    ConnectError,
    ContractError,
    EagleTargetError,
    Overloaded,
    RequestTooLarge,
    ServerError,
    TransferTimeout,
    TransportRefused,
    Unavailable,
    VocabMappingError,
)
from eagle_target.protocol.problems import ProblemType, problem_document, problem_type, read_problem

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def test_a_client_raises_what_the_server_raised() -> None:
    for problem in ProblemType:
        raised = problem.error("what and how", retry_after=7.0)
        answered = problem_type(raised)
        body = json.dumps(problem_document(answered, str(raised), status=answered.status, retry_after=7.0)).encode()

        read = read_problem("http://server", answered.status, {"Retry-After": "7"}, body)

        assert answered is problem
        assert type(read) is type(raised) is problem.kind
        assert str(read) == "http://server: what and how"
        if isinstance(read, ServerError):
            assert (read.status, read.problem, read.retry_after) == (problem.status, problem, 7.0)


@pytest.mark.parametrize(
    ("name", "status", "kind"),
    [
        ("contract", 422, ContractError),
        ("queue-full", 503, Overloaded),
        ("headers-too-large", 431, RequestTooLarge),
        ("loading", 503, Unavailable),
        ("unauthorized", 401, ServerError),
    ],
)
def test_names_and_statuses_are_those_of_the_protocol(name: str, status: int, kind: type[EagleTargetError]) -> None:
    problem = ProblemType.named(name)
    assert (problem, problem.status, problem.kind) == (name, status, kind)


def test_the_narrowest_problem_is_answered() -> None:
    assert problem_type(VocabMappingError("x")) == "invalid-vocab-mapping"
    assert problem_type(ContractError("x")) == "contract"
    assert problem_type(TransportRefused("x")) == problem_type(ConnectError("x")) == "transport-refused"
    assert problem_type(TransferTimeout("x")) == "transport-failed"
    assert problem_type(KeyError("x")) == problem_type(EagleTargetError("x")) == "internal"


def test_every_problem_is_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    # Something that is no server of ours answers `http`, and nobody is there to be told of the other.
    undocumented = {problem for problem in ProblemType if f"`{problem}`" not in page}
    assert undocumented == {ProblemType.HTTP, ProblemType.CLIENT_GONE}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff\xfe", b'{"type": 3}', b'"x"'])
@pytest.mark.parametrize(("status", "kind"), [(404, ServerError), (500, ServerError), (502, Unavailable)])
def test_something_else_may_have_answered(body: bytes, status: int, kind: type[ServerError]) -> None:
    error = read_problem("http://x", status, {"Retry-After": "soon"}, body)
    assert type(error) is kind
    assert isinstance(error, ServerError)
    assert (error.status, error.problem, error.retry_after) == (status, "http", None)
