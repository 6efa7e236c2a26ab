"""Every fault leaves this process as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_target.testing.server import loopback_server
from tests.faults.processes import faulty_server, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Started once, as is a server of this process: what they open for good is not left behind by a test."""
    with faulty_server(), loopback_server():
        pass


@pytest.fixture(autouse=True)
def leak_check(fork_server: None, request: pytest.FixtureRequest) -> Iterator[None]:
    # Servers that a module's tests share start first.
    for name in ("server", "large_server"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    with nothing_left_behind():
        yield
