"""The servers of the test kit: ready when they are handed out, gone afterwards, and plain about failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import urllib3

from eagle_target import RemoteEagle3TargetModel
from eagle_target.errors import AdapterError
from eagle_target.testing.server import ServerNotReady, embedding_process, loopback_server, server_process
from eagle_target.testing.tiny import EmbeddingRunner

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.testing.fixtures import ServeOnLoopback


def is_listening(url: str) -> bool:
    with urllib3.PoolManager(timeout=2.0, retries=False) as http:
        try:
            return http.request("GET", f"{url}/health").status == 200
        except urllib3.exceptions.HTTPError:
            return False


def test_a_loopback_server_is_ready_and_then_gone() -> None:
    runner = EmbeddingRunner()
    with loopback_server(lambda: runner, max_queue=3) as server:
        assert is_listening(server.url)
        with RemoteEagle3TargetModel.from_urls([server.url], ready_timeout=0) as client:
            assert client.model_info()["vocab_size"] == 211

    assert not is_listening(server.url)
    assert runner.closed


def test_several_loopback_servers_end_with_the_test(loopback_server: ServeOnLoopback) -> None:
    urls = [loopback_server().url, loopback_server(lambda: EmbeddingRunner(seed=1)).url]

    assert len({*urls}) == 2
    assert all(is_listening(url) for url in urls)


def test_a_target_that_cannot_be_loaded_is_named() -> None:
    def fail() -> EmbeddingRunner:
        raise AdapterError("no such checkpoint")

    with pytest.raises(ServerNotReady, match="failed: no such checkpoint"), loopback_server(fail):
        pass


def test_a_process_serves_what_it_was_asked_for_and_is_killed() -> None:
    with embedding_process({"vocab_size": 99, "num_layers": 9}, aux_layer_ids=[0, 3, 8]) as server:
        with RemoteEagle3TargetModel.from_urls([server.url]) as client:
            info = client.model_info()
        assert "serving embedding-99x16x9" in server.log or server.process.poll() is None

    assert (info["vocab_size"], info["aux_layer_ids"]) == (99, [0, 3, 8])
    assert server.process.poll() is not None
    assert not is_listening(server.url)


def test_a_process_that_ends_shows_its_log(tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path), "--engine", "no-such-engine"]

    with (
        pytest.raises(ServerNotReady, match=r"exit status 1(.|\n)*there is no adapter 'no-such-engine'"),
        server_process(arguments),
    ):
        pass


def test_a_process_that_is_not_ready_in_time_is_killed() -> None:
    with pytest.raises(ServerNotReady, match="exit status None"), embedding_process(ready_timeout=0.01):
        pass
