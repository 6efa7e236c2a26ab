"""Fixtures for tests of plugins and trainers: `pytest_plugins = ["eagle_target.testing.fixtures"]`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from eagle_target.testing import server
from eagle_target.testing.tiny import EmbeddingRunner, save_tiny_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.server.run import HttpServer


class ServeOnLoopback(Protocol):
    """Starts servers that end with the test."""

    def __call__(self, load: Callable[[], TargetRunner] = ..., **settings: Any) -> HttpServer:
        """Serve what `load` makes, with settings of `ServerConfig`."""
        ...


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama checkpoint with its own LM head."""
    return save_tiny_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tied_tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama checkpoint whose LM head is its input embedding."""
    return save_tiny_target(tmp_path_factory.mktemp("tied-tiny-target"), tied=True)


@pytest.fixture
def embedding_runner() -> Iterator[EmbeddingRunner]:
    """A deterministic runner in plain torch, without an engine."""
    runner = EmbeddingRunner()
    yield runner
    runner.close()


@pytest.fixture
def loopback_server() -> Iterator[ServeOnLoopback]:
    """Start real servers on free ports of this machine; by default of an `EmbeddingRunner`."""
    with contextlib.ExitStack() as running:

        def serve(load: Callable[[], TargetRunner] = EmbeddingRunner, **settings: Any) -> HttpServer:
            return running.enter_context(server.loopback_server(load, **settings))

        yield serve
