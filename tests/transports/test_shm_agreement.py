"""When shared memory is taken, when it is refused, and what is said about it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from eagle_target_shm import server
from eagle_target_shm.hosts import this_host
from eagle_target_shm.transport import ShmTransport

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import TransportRefused
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.server.cases import mapping_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that says it runs on another host."""
    monkeypatch.setattr(server, "this_host", lambda: {**this_host(), "host": "0123456789abcdef"})
    with loopback_server(transports=("shm", "wire")) as running:
        yield running.url


def test_a_server_on_this_host_is_read_from_memory() -> None:
    with (
        loopback_server(transports=("shm", "wire")) as running,
        RemoteEagle3TargetModel.from_urls([running.url], encoding="probs") as target,
    ):
        target.set_vocab_mapping(mapping_of())
        for seed in range(3):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        [described] = target.model_info()["servers"]
        assert (described["transport"], described["transports_refused"]) == ("shm", {})


def test_a_server_on_another_host_is_an_error_that_says_so(elsewhere: str) -> None:
    with pytest.raises(TransportRefused, match=r"another host \(boot '0123456789abcdef'"):
        RemoteEagle3TargetModel.from_urls([elsewhere], transport="shm", ready_timeout=5.0)


@pytest.mark.parametrize(("transport", "level"), [("shm,wire", logging.WARNING), ("auto", logging.INFO)])
def test_a_list_is_stepped_down_once(
    elsewhere: str, caplog: pytest.LogCaptureFixture, transport: str, level: int
) -> None:
    caplog.set_level(logging.INFO, "eagle_target.client.session")
    with RemoteEagle3TargetModel.from_urls([elsewhere], transport=transport, encoding="probs") as target:
        target.set_vocab_mapping(mapping_of())
        for seed in range(3):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        [described] = target.model_info()["servers"]
    assert described["transport"] == "wire"
    assert "another host" in described["transports_refused"]["shm"]
    told = [record for record in caplog.records if "another host" in record.getMessage()]
    assert [record.levelno for record in told] == [level]


def test_a_machine_that_cannot_share_memory_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert "64-bit Linux" in str(ShmTransport.unusable_reason())
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "boot_id" in str(ShmTransport.unusable_reason())
