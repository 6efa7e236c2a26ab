"""Channels that break, are refused, expire and come back, under a client that goes on."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest
from eagle_target_inprocess.transport import InProcessTransport

from eagle_target.client import balancer, session
from eagle_target.client.lease import ChannelControl
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import ConnectError, TransferTimeout
from eagle_target.plugins.registry import Origin, load_plugins
from eagle_target.plugins.transport import ClientChannel
from eagle_target.protocol import messages
from eagle_target.testing.server import loopback_server
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.server.cases import TestRunner, mapping_of, wait_until
from tests.server.http import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from eagle_target.contract.model_info import ServerState
    from eagle_target.contract.sinks import Sink
    from eagle_target.errors import TransportError
    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.transport import ControlPlane, IncomingBody
    from eagle_target.server.run import HttpServer

SOON_SECONDS = 20.0
LEASE_SECONDS = 1.2


def nothing() -> None:
    return


class FragileTransport(InProcessTransport):
    """`inprocess` that breaks, refuses or is passed over when a test says so."""

    name: ClassVar[str] = "fragile"
    rank: ClassVar[int] = 200
    failures: ClassVar[list[TransportError]] = []
    refusal: ClassVar[str | None] = None
    against: ClassVar[str | None] = None
    before_connect: ClassVar[Callable[[], None]] = nothing
    opened: ClassVar[list[FragileChannel]] = []

    @classmethod
    def auto_refusal(cls, control: ControlPlane) -> str | None:
        return cls.against

    @classmethod
    def connect(cls, options: PluginOptions, offer: Mapping[str, Any], control: ControlPlane) -> ClientChannel:
        cls.before_connect()
        if cls.refusal is not None:
            raise ConnectError(cls.refusal)
        channel = FragileChannel(super().connect(options, offer, control), cast("ChannelControl", control))
        cls.opened.append(channel)
        return channel


class FragileChannel(ClientChannel):
    """Breaks for good with the first of the failures still to come."""

    def __init__(self, inner: ClientChannel, control: ChannelControl) -> None:
        self._inner = inner
        self._broken = False
        self._gate: threading.Event | None = None
        self._entered = threading.Event()
        self.control = control
        self.closed = False

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Keep what is received in the block until its end; gives the event that something is."""
        self._gate = threading.Event()
        try:
            yield self._entered
        finally:
            self._gate.set()

    @property
    def broken(self) -> bool:
        return self._broken

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        if FragileTransport.failures:
            self._broken = True
            raise FragileTransport.failures.pop()
        if self._gate is not None:
            self._entered.set()
            assert self._gate.wait(SOON_SECONDS)
        return self._inner.receive(body, sink)

    def close(self) -> None:
        self.closed = True
        self._inner.close()


@pytest.fixture(autouse=True)
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load_plugins().transports.origins, "fragile", Origin(FragileTransport, "tests", "0"))
    fresh: dict[str, Any] = {
        "failures": [],
        "refusal": None,
        "against": None,
        "before_connect": nothing,
        "opened": [],
    }
    for name, value in fresh.items():
        monkeypatch.setattr(FragileTransport, name, value)
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(session, "FIRST_RETURN_SECONDS", 0.05)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with loopback_server(TestRunner, transports=("fragile", "wire"), channel_lease=LEASE_SECONDS) as running:
        yield running


@contextlib.contextmanager
def remote(server: HttpServer, transport: str, **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    options = {"encoding": "probs", "timeout": 30.0, "retry_timeout": 0.0, **options}
    with RemoteEagle3TargetModel.from_urls([server.url], transport=transport, **options) as target:
        target.set_vocab_mapping(mapping_of())
        yield target


def assert_right(target: RemoteEagle3TargetModel, seed: int = 0) -> None:
    assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))


def transport_after_a_batch(target: RemoteEagle3TargetModel) -> str:
    assert_right(target)
    return str(described(target)["transport"])


def described(target: RemoteEagle3TargetModel) -> ServerState:
    return target.model_info()["servers"][0]


def test_a_channel_that_breaks_is_opened_again_and_the_batch_asked_for_again(server: HttpServer) -> None:
    with remote(server, "fragile") as target:
        for seed in range(5):
            FragileTransport.failures.append(ConnectError("cut"))
            assert_right(target, seed)
        assert (described(target)["transport"], described(target)["fallbacks"]) == ("fragile", 0)
        assert target.model_info()["traffic"]["retries"] == 0
        assert len(FragileTransport.opened) == 6
        assert server._channels.count("fragile") == 1
    assert all(channel.closed for channel in FragileTransport.opened)
    assert server._channels.count("fragile") == 0


def test_a_channel_that_keeps_breaking_is_an_error_after_the_retries(server: HttpServer) -> None:
    FragileTransport.failures.extend(ConnectError("cut") for _ in range(100))
    with remote(server, "fragile", max_retries=1) as target, pytest.raises(ConnectError, match=r"cut .*2 attempts"):
        target.generate_batch(**rows_of())


def test_a_transfer_that_timed_out_on_a_broken_channel_is_a_retry_on_another(server: HttpServer) -> None:
    with remote(server, "fragile") as target:
        FragileTransport.failures.append(TransferTimeout("late"))
        assert_right(target)
        assert target.model_info()["traffic"]["retries"] == 1
        assert len(FragileTransport.opened) == 2


@pytest.mark.parametrize("transport", ["fragile,wire", "auto"])
def test_with_a_choice_the_next_transport_serves_until_the_better_one_is_back(
    server: HttpServer, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    with remote(server, transport) as target:
        assert described(target)["transport"] == "fragile"
        FragileTransport.failures.append(ConnectError("cut"))
        FragileTransport.refusal = "no way"
        for seed in range(3):
            assert_right(target, seed)
        now = described(target)
        assert (now["transport"], now["fallbacks"], [*now["transports_refused"]]) == ("wire", 1, ["fragile"])
        FragileTransport.refusal = None
        wait_until(lambda: transport_after_a_batch(target) == "fragile")
        assert described(target)["transports_refused"] == {}
        assert target.model_info()["traffic"]["retries"] == 0
    assert caplog.text.count("is stepped down from") == 1
    text = ask(server.url, "GET", messages.METRICS).body.decode()
    (passed_over,) = re.findall(r'eagle_target_passed_over_requests_total\{transport="fragile"\} (\S+)', text)
    assert float(passed_over) >= 3


def test_many_requests_on_a_channel_that_breaks_step_down_once(server: HttpServer) -> None:
    with remote(server, "fragile,wire") as target:
        FragileTransport.refusal = "not any more"
        FragileTransport.failures.append(ConnectError("cut"))
        futures = [target.generate_batch_async(**rows_of(seed)) for seed in range(12)]
        for seed, future in enumerate(futures):
            assert_same_batch(future.result(SOON_SECONDS), expected_batch(rows_of(seed)))
        assert described(target)["fallbacks"] == 1


def test_auto_passes_over_what_works_but_is_not_meant(server: HttpServer) -> None:
    FragileTransport.against = "only for the very patient"
    with remote(server, "auto") as target:
        assert described(target)["transport"] == "wire"
        assert described(target)["transports_refused"] == {"fragile": "only for the very patient"}
    with remote(server, "fragile") as target:
        assert described(target)["transport"] == "fragile"


def test_a_transport_asked_for_by_name_is_never_replaced(server: HttpServer) -> None:
    FragileTransport.refusal = "no way"
    with pytest.raises(ConnectError, match=r"no transport to .* works: .*no way"):
        RemoteEagle3TargetModel.from_urls([server.url], transport="fragile")


def test_a_client_that_is_idle_keeps_its_channel(server: HttpServer) -> None:
    with remote(server, "fragile") as target:
        time.sleep(2.5 * LEASE_SECONDS)
        assert_right(target)
        assert len(FragileTransport.opened) == 1
    assert server._channels.expired.total() == 0


def test_a_client_that_is_silent_loses_its_channel_and_gets_another(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote(server, "fragile") as target:
        with monkeypatch.context() as silence:
            silence.setattr(ChannelControl, "renew", lambda *_: None)
            wait_until(lambda: not server._channels.count("fragile"))
        assert server._channels.expired == {"fragile": 1}
        assert_right(target)
        assert server._channels.count("fragile") == 1
        assert target.model_info()["traffic"]["retries"] == 0


def test_a_client_hears_that_its_channel_is_gone_without_asking(server: HttpServer) -> None:
    with remote(server, "fragile") as target:
        (opened,) = FragileTransport.opened
        server._channels.close_channel("fragile", opened.control.channel_id or "")
        wait_until(lambda: opened.control.lost)
        assert_right(target)
        assert len(FragileTransport.opened) == 2


def test_a_channel_is_not_closed_under_a_request_that_uses_it(server: HttpServer) -> None:
    with remote(server, "fragile") as target, ThreadPoolExecutor(1) as pool:
        (first,) = FragileTransport.opened
        with first.held() as in_use:
            slow = pool.submit(target.generate_batch, **rows_of(1))
            assert in_use.wait(SOON_SECONDS)
            first.control.lost = True
            assert_right(target)
            assert [channel.closed for channel in FragileTransport.opened] == [False, False]
        assert_same_batch(slow.result(SOON_SECONDS), expected_batch(rows_of(1)))
        assert [channel.closed for channel in FragileTransport.opened] == [True, False]


def test_one_request_at_a_time_tries_for_a_better_transport(server: HttpServer) -> None:
    with remote(server, "fragile,wire") as target, ThreadPoolExecutor(1) as pool:
        FragileTransport.failures.append(ConnectError("cut"))
        assert_right(target)
        assert described(target)["transport"] == "wire"
        connecting, go = threading.Event(), threading.Event()

        def connect_slowly() -> None:
            connecting.set()
            assert go.wait(SOON_SECONDS)

        FragileTransport.before_connect = connect_slowly
        wait_until(lambda: pool.submit(assert_right, target) and connecting.wait(0.1))
        assert_right(target, 1)
        assert described(target)["transport"] == "wire"
        go.set()
        wait_until(lambda: described(target)["transport"] == "fragile")
        assert_right(target, 2)
        assert described(target)["fallbacks"] == 1


def test_one_thread_renews_a_client_and_its_channel(server: HttpServer) -> None:
    with remote(server, "fragile") as target:
        time.sleep(1.5 * LEASE_SECONDS)
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("eagle-target-lease") == 1
        assert (server._channels.count("fragile"), server.engine.clients.count()) == (1, 1)
        assert_right(target)
