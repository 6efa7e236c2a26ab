"""What is nccl's own: groups beside others, outboxes, ends that close or fall silent, and reasons for refusals."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from eagle_target_nccl.gate import NAME_BYTES
from eagle_target_nccl.groups import TcpGroup
from eagle_target_nccl.layout import Staging, cut_bytes, group_sizes
from eagle_target_nccl.transport import NcclTransport

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import (
    ConnectError,
    Overloaded,
    ProtocolError,
    TransferTimeout,
    TransportError,
    TransportRefused,
)
from eagle_target.plugins.options import build_model
from eagle_target.seals import KEY_BYTES
from eagle_target.testing.comparison import assert_same_batch, assert_same_bits
from eagle_target.testing.server import loopback_server
from eagle_target.testing.transport_harness import ChannelPair, MemoryBody, MemoryControl
from tests.client.batches import expected_batch, rows_of
from tests.faults.nccl_ends import proxied_groups
from tests.server.cases import PATIENCE_SECONDS, mapping_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.plugins.transport import ServerEndpoint

SENDERS = "eagle-target-nccl"
# An address of documentation (RFC 5737), which no machine has.
FOREIGN_ADDRESS = "192.0.2.1"
HELLO = {"backend": "tcp", "target_device": "cpu", "digest": "xxh3_128", "gpu": None}


def senders() -> int:
    return sum(thread.name == SENDERS for thread in threading.enumerate())


@contextlib.contextmanager
def listening(**options: Any) -> Iterator[ServerEndpoint]:
    endpoint = NcclTransport.listen(build_model(NcclTransport.options_model, options, "options"))
    try:
        yield endpoint
    finally:
        endpoint.close()


@contextlib.contextmanager
def joined(**options: Any) -> Iterator[ChannelPair]:
    with listening(**options) as endpoint:
        pair = ChannelPair(NcclTransport, endpoint, options)
        try:
            yield pair
        finally:
            pair.close()
    wait_until(lambda: senders() == 0, "the end of the channel's thread")


@contextlib.contextmanager
def connected(url: str, transport: str = "nccl", **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    options = {"encoding": "probs", "timeout": PATIENCE_SECONDS, **options}
    with RemoteEagle3TargetModel.from_urls([url], transport=transport, **options) as target:
        target.set_vocab_mapping(mapping_of())
        yield target


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def transport_of(target: RemoteEagle3TargetModel) -> str:
    return str(target.model_info()["servers"][0]["transport"])


def transport_after_a_batch(target: RemoteEagle3TargetModel) -> str:
    assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
    return transport_of(target)


def large() -> dict[str, torch.Tensor]:
    return {"large": torch.arange(8 << 20, dtype=torch.int32)}


class LyingControl(MemoryControl):
    """A server that tells its client something else than it knows."""

    lie: ClassVar[dict[str, Any]] = {}

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        return {**super().tell(message, timeout=timeout), **self.lie}


class StrayingControl(LyingControl):
    """It names another client to its gate."""

    lie: ClassVar[dict[str, Any]] = {"name": "00" * NAME_BYTES}


class StrangeControl(LyingControl):
    """It gives the key of another group."""

    lie: ClassVar[dict[str, Any]] = {"key": "00" * KEY_BYTES}


class ClosingControl(MemoryControl):
    """A server that goes away as soon as it has told where to meet."""

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        answer = super().tell(message, timeout=timeout)
        self.endpoint.close()
        return answer


def refusal(control: MemoryControl, **options: Any) -> str:
    checked = build_model(NcclTransport.options_model, options, "options")
    with pytest.raises(ConnectError) as raised:
        NcclTransport.connect(checked, control.endpoint.offer(), control)
    for channel in control.accepted:
        channel.close()
    return str(raised.value)


def test_many_clients_have_a_group_each() -> None:
    count = 8
    with loopback_server(transports=("nccl",)) as server, contextlib.ExitStack() as clients:
        targets = [clients.enter_context(connected(server.url)) for _ in range(count)]
        wait_until(lambda: senders() == count)

        def check(seed: int) -> None:
            batch = targets[seed % count].generate_batch(**rows_of(seed))
            assert_same_batch(batch, expected_batch(rows_of(seed)))

        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(check, seed) for seed in range(4 * count)]:
                done.result(PATIENCE_SECONDS)
    assert senders() == 0


def test_one_port_serves_all_clients_and_is_open_only_while_one_is_expected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    answers = []
    with listening(port=port, connect_timeout=0.3) as endpoint:
        for _ in range(2):
            channel, _ = endpoint.accept(HELLO, reached_at="127.0.0.1")
            assert not is_open(port)
            answers.append(channel.answer({"join": True}))
            assert is_open(port)
            with pytest.raises(TransportError, match="already"):
                channel.answer({"join": True})
            channel.close()
            assert not is_open(port)
    assert [answer["port"] for answer in answers] == [port] * 2
    assert answers[0]["name"] != answers[1]["name"]
    assert answers[0]["key"] != answers[1]["key"]


def test_a_group_that_carries_nothing_is_released_and_the_next_batch_opens_another() -> None:
    options = {"nccl": {"idle_timeout": 0.3}}
    with (
        loopback_server(transports=("nccl", "wire"), transport_options=options) as server,
        connected(server.url, "nccl,wire") as target,
    ):
        for seed in range(3):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
            assert transport_of(target) == "nccl"
            wait_until(lambda: senders() == 0, "the end of the idle group")
        assert target.model_info()["servers"][0]["fallbacks"] == 0


def test_a_list_steps_down_once_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pull = TcpGroup.pull

    def break_once(self: TcpGroup, *arguments: Any) -> None:
        monkeypatch.undo()
        self.abort()
        pull(self, *arguments)

    with loopback_server(transports=("nccl", "wire")) as server, connected(server.url, "nccl,wire") as target:
        assert transport_of(target) == "nccl"
        monkeypatch.setattr(TcpGroup, "pull", break_once)
        with caplog.at_level(logging.WARNING, "eagle_target.client"):
            assert_same_batch(target.generate_batch(**rows_of(1)), expected_batch(rows_of(1)))
        assert transport_of(target) == "wire"
        assert target.model_info()["servers"][0]["fallbacks"] == 1
        assert len([record for record in caplog.records if "stepped down" in record.getMessage()]) == 1
        wait_until(lambda: transport_after_a_batch(target) == "nccl", "the way back")
        assert_same_batch(target.generate_batch(**rows_of(2)), expected_batch(rows_of(2)))
        assert target.model_info()["traffic"]["retries"] == 0


@pytest.mark.parametrize("end", ["client", "server"])
def test_either_end_may_close_in_the_middle_of_a_transfer(end: str) -> None:
    with proxied_groups() as groups, joined() as pair:
        reply = pair.server.send("t", large(), {})
        with groups.in_the_midst(getattr(pair, end).close), pytest.raises(ConnectError):
            pair.client.receive(MemoryBody.of(reply), PackedTensors())
        assert pair.client.broken


def test_a_client_whose_turn_does_not_come_has_a_timeout_and_the_channel_goes_on() -> None:
    with proxied_groups() as groups, joined() as pair, ThreadPoolExecutor(1) as pool:
        bodies = [MemoryBody.of(pair.server.send(name, large(), {})) for name in ("first", "second")]
        received, is_in_its_midst = PackedTensors(), threading.Event()
        with groups.in_the_midst(is_in_its_midst.set, then="hold"):
            receiving = pool.submit(pair.client.receive, bodies[0], received)
            assert is_in_its_midst.wait(PATIENCE_SECONDS)
            bodies[1].deadline = time.monotonic()
            with pytest.raises(TransferTimeout, match="another transfer"):
                pair.client.receive(bodies[1], PackedTensors())
        groups.release()
        receiving.result(PATIENCE_SECONDS)
        assert_same_bits(received, large())


def test_an_outbox_takes_one_transfer_of_any_size_and_others_up_to_its_bytes() -> None:
    with joined(outbox_bytes=100) as pair:
        first = pair.server.send("first", large(), {})
        with pytest.raises(Overloaded, match="outbox_bytes, 100"):
            pair.server.send("second", {"small": torch.zeros(1)}, {})
        received = PackedTensors()
        pair.client.receive(MemoryBody.of(first), received)
        assert_same_bits(received, large())
        pair.server.send("second", {"small": torch.zeros(1)}, {})


def test_a_transfer_that_nobody_asked_for_in_time_is_gone_and_the_channel_goes_on() -> None:
    with joined(transfer_timeout=1.0) as pair:
        late = pair.server.send("late", large(), {})
        time.sleep(2.0)
        with pytest.raises(ProtocolError, match="no transfer 'late/1'"):
            pair.client.receive(MemoryBody.of(late), PackedTensors())
        assert not pair.client.broken
        tensors = {"small": torch.ones(3)}
        assert_same_bits(pair.transfer("next", tensors)[0], tensors)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"what": 1},
        {"pull": "t/1"},
        {"pull": "t/1", "number": 1, "cuts": [1]},
        {"pull": "t/1", "number": 1, "cuts": [-4, 8]},
        {"pull": "t/1", "number": 0, "cuts": [4]},
        {"pull": "t/1", "number": 1, "cuts": 4},
        {"pull": "t/1", "cuts": [4]},
    ],
    ids=str,
)
def test_messages_that_make_no_sense_are_refused(message: dict[str, Any]) -> None:
    with joined() as pair:
        pair.server.send("t", {"small": torch.ones(1)}, {})
        with pytest.raises(TransportError):
            pair.server.answer(message)
        tensors = {"small": torch.ones(3)}
        assert_same_bits(pair.transfer("next", tensors)[0], tensors)


def test_refusals_name_the_cause() -> None:
    with listening() as endpoint:
        assert "cannot use 'nccl'" in refusal(MemoryControl(endpoint, device="cuda:0", target_device="cuda:1"))
        assert "cannot connect to no-such-host.invalid" in refusal(
            MemoryControl(endpoint, address="no-such-host.invalid")
        )
        assert "cannot listen" in refusal(MemoryControl(endpoint, reached_at=FOREIGN_ADDRESS))
        assert "no group with the server" in refusal(StrayingControl(endpoint))
        assert "cannot connect to 127.0.0.1" in refusal(ClosingControl(endpoint))
    with socket.create_server(("127.0.0.1", 0)) as taken, listening(port=taken.getsockname()[1]) as endpoint:
        assert "cannot listen" in refusal(MemoryControl(endpoint))
    for address in ("0.0.0.0", "224.0.0.1", "no-such-host.invalid"):
        with listening(host=address) as endpoint, pytest.raises(ConnectError, match="address"):
            endpoint.accept(HELLO, reached_at="127.0.0.1")
    with listening() as endpoint, pytest.raises(ConnectError, match="digest 'none'"):
        endpoint.accept({**HELLO, "digest": "none"}, reached_at="127.0.0.1")
    wait_until(lambda: senders() == 0, "the end of threads that waited for a client")


def test_a_server_with_another_key_is_refused_at_both_ends() -> None:
    with listening() as endpoint:
        control = StrangeControl(endpoint)
        assert "no group with the server" in refusal(control)
        wait_until(lambda: senders() == 0, "the end of the server's thread")
        assert "has not the key" in MemoryControl.tell(control, {"state": True})["failure"]


def test_a_name_of_the_server_s_own_is_where_the_client_goes() -> None:
    with listening(host="127.0.0.2") as endpoint:
        pair = ChannelPair(NcclTransport, endpoint, {})
        tensors = {"small": torch.ones(3)}
        assert_same_bits(pair.transfer("t", tensors)[0], tensors)
        pair.close()


@pytest.mark.parametrize("is_private", [False, True])
def test_what_came_over_tls_is_held_to_sha256(is_private: bool) -> None:
    hellos: list[Mapping[str, Any]] = []

    class Watching(MemoryControl):
        def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
            hellos.append(hello)
            return super().open_channel(hello)

    with listening() as endpoint:
        control = Watching(endpoint, is_private=is_private)
        NcclTransport.connect(NcclTransport.options_model(), endpoint.offer(), control).close()
        control.accepted[0].close()
    assert [hello["digest"] for hello in hellos] == ["sha256" if is_private else "xxh3_128"]


def test_a_client_that_joins_and_does_not_come_costs_a_thread_for_no_longer_than_the_timeout() -> None:
    with listening(connect_timeout=0.3) as endpoint:
        control = MemoryControl(endpoint)
        control.open_channel(HELLO)
        control.tell({"join": True})
        assert senders() == 1
        wait_until(lambda: senders() == 0)
        assert "no client came" in control.tell({"state": True})["failure"]


def test_by_name_it_is_used_or_the_cause_is_told() -> None:
    options = {"nccl": {"host": FOREIGN_ADDRESS}}
    with loopback_server(transports=("nccl", "wire"), transport_options=options) as server:
        with pytest.raises(TransportRefused, match=f"cannot listen at '{FOREIGN_ADDRESS}'"), connected(server.url):
            pass
        with connected(server.url, "nccl,wire") as target:
            assert transport_of(target) == "wire"


def test_auto_does_not_take_it() -> None:
    with listening() as endpoint:
        for device, target_device in (("cpu", "cpu"), ("cuda:0", "cpu"), ("cpu", "cuda"), ("cuda:1", "cuda")):
            control = MemoryControl(endpoint, device=device, target_device=target_device)
            assert "nccl is experimental" in (NcclTransport.auto_refusal(control) or "")


@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_cut_and_put_together_again(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def sizes() -> list[int]:
        kinds = torch.randint(0, 3, (40,), generator=draw)
        return (kinds * torch.randint(0, 90, (40,), generator=draw) ** kinds // 2).tolist()

    sent, wanted = sizes(), sizes()
    total = max(sum(sent), sum(wanted))
    sent.append(total - sum(sent))
    wanted.append(total - sum(wanted))
    groups = group_sizes(wanted, large_bytes=50)
    assert [index for group in groups for index in group if wanted[index]] == [i for i, n in enumerate(wanted) if n]
    cuts = [sum(wanted[index] for index in group) for group in groups]
    everything = torch.randint(0, 256, (total,), generator=draw, dtype=torch.uint8)

    messages = cut_bytes(list(everything.split_with_sizes(sent)), cuts, Staging(torch.device("cpu")))

    assert [len(message) for message in messages] == cuts
    assert torch.equal(torch.cat(messages), everything)
