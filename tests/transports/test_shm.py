"""The shm transport passes the suite that every transport passes, and keeps its memory in order."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_shm import client, server
from eagle_target_shm.doorway import NAME_BYTES, Invitation, enter
from eagle_target_shm.hosts import this_host
from eagle_target_shm.memory import SharedTensors
from eagle_target_shm.options import ShmOptions
from eagle_target_shm.server import ShmServerChannel, ShmServerEndpoint
from eagle_target_shm.tickets import CONTENT_TYPE
from eagle_target_shm.transport import ShmTransport

from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ConnectError, ProtocolError, RequestTooLarge, TransferTimeout
from eagle_target.seals import KEY_BYTES
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.transport_harness import ChannelPair, MemoryBody
from eagle_target.testing.transports import TransportConformance
from tests.faults.processes import named_memory
from tests.server.cases import wait_until

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

MEBIBYTE = 1 << 20


class TestShmTransport(TransportConformance):
    transport = ShmTransport
    survives_peer_death = True


class Pair(ChannelPair):
    """A channel whose sides the tests look into."""

    def __init__(self, endpoint: ShmServerEndpoint) -> None:
        super().__init__(ShmTransport, endpoint, {})
        assert isinstance(self.server, ShmServerChannel)
        self.made = self.server
        self.endpoint = endpoint

    @property
    def used(self) -> int:
        return self.made.used_bytes

    def body(self, transfer_id: str = "t", **tensors: torch.Tensor) -> MemoryBody:
        return MemoryBody.of(self.server.send(transfer_id, tensors, {}))

    def receive(self, body: MemoryBody) -> PackedTensors:
        received = PackedTensors()
        self.client.receive(body, received)
        return received


@pytest.fixture
def small() -> Iterator[Pair]:
    """16 MiB, and short patience."""
    endpoint = listening(max_bytes=16 * MEBIBYTE, send_timeout=0.8, take_timeout=0.8)
    pair = Pair(endpoint)
    yield pair
    pair.close()
    endpoint.close()


@pytest.fixture
def patient() -> Iterator[Pair]:
    """16 MiB, and long patience."""
    endpoint = listening(max_bytes=16 * MEBIBYTE)
    pair = Pair(endpoint)
    yield pair
    pair.close()
    endpoint.close()


def listening(**options: Any) -> ShmServerEndpoint:
    return ShmServerEndpoint(ShmOptions(**options))


def mebibytes(count: int, value: int = 0) -> torch.Tensor:
    return torch.full((count, MEBIBYTE), value, dtype=torch.uint8)


def test_an_answer_is_made_where_the_client_reads_it(small: Pair) -> None:
    answer = small.server.new_tensors()
    rows = answer.allocate("probs", (3, 1000), torch.float32)
    rows.write(0, torch.ones(3, 1000))
    answer.put("aux", torch.arange(10))
    answer.put("none", torch.empty(0, 4))
    used = small.used

    received = small.receive(MemoryBody.of(small.server.send("t", answer, {})))

    assert_same_bits(received, answer)
    assert small.used == used
    rows.out[2, 7] = 5.0
    assert received["probs"][2, 7] == 5.0


def test_memory_is_used_again_when_both_sides_have_let_go(small: Pair) -> None:
    offsets = set()
    for value in range(20):
        reply = small.server.send("t", {"large": mebibytes(9, value), "small": torch.tensor([value])}, {})
        received = small.receive(MemoryBody.of(reply))
        ticket = json.loads(b"".join(reply.parts))
        offsets.add(ticket["tensors"][0][4])
        view = received["large"][3:, 5]
        received.clear()
        assert int(view[0]) == value
        del view, received
        wait_until(lambda: small.used == 0)
    assert len(offsets) == 1


def test_an_answer_that_is_never_sent_gives_its_memory_back(small: Pair) -> None:
    answer = small.server.new_tensors()
    answer.allocate("probs", (3, 1000), torch.float32)
    assert small.used
    del answer
    gc.collect()
    assert small.used == 0


def test_tensors_outlive_their_channel(small: Pair) -> None:
    received = small.receive(small.body(rows=mebibytes(2, 7)))
    small.close()
    gc.collect()
    assert bool((received["rows"] == 7).all())
    assert small.client.broken


def test_a_client_that_holds_everything_hurts_itself_alone() -> None:
    endpoint = listening(max_bytes=16 * MEBIBYTE, send_timeout=0.2)
    greedy, other = Pair(endpoint), Pair(endpoint)
    held = [greedy.receive(greedy.body(rows=mebibytes(8, value))) for value in (1, 2)]
    for value in range(20):
        assert int(other.receive(other.body(rows=mebibytes(8, value)))["rows"][0, 0]) == value
    with pytest.raises(TransferTimeout, match=r"transfer full: .* within 0.2 s.* option max_bytes"):
        greedy.body("full", rows=mebibytes(2))
    assert [int(each["rows"][0, 0]) for each in held] == [1, 2]
    held.pop()
    assert int(greedy.receive(greedy.body(rows=mebibytes(8, 3)))["rows"][0, 0]) == 3
    held.clear()
    for pair in (greedy, other):
        pair.close()
    endpoint.close()


def test_a_send_waits_for_the_client_to_let_go(patient: Pair) -> None:
    held = [patient.receive(patient.body(rows=mebibytes(8, value))) for value in (1, 2)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patient.body, "late", rows=mebibytes(4, 9))
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        held.pop()
        assert int(patient.receive(waiting.result(20))["rows"][3, 3]) == 9


def test_answers_that_wait_for_each_others_room_go_one_by_one(patient: Pair) -> None:
    """Each of three has a part in shared memory; no two fit as a whole."""
    answers = [patient.server.new_tensors() for _ in range(3)]
    for part in ("first", "second"):
        for value, answer in enumerate(answers):
            answer.allocate(part, (5, MEBIBYTE), torch.uint8).write(0, mebibytes(5, value))
    assert all(isinstance(answer, SharedTensors) for answer in answers)

    def travel(value: int) -> int:
        answer = answers[value]
        received = patient.receive(MemoryBody.of(patient.server.send(f"t{value}", answer, {})))
        assert_same_bits(received, answer)
        answer.clear()
        return int(received["second"][0, 0])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(travel, range(3), timeout=20)) == [0, 1, 2]


def test_the_engine_never_waits_for_room(patient: Pair) -> None:
    held = patient.receive(patient.body(rows=mebibytes(16, 1)))
    answer = patient.server.new_tensors()
    answer.allocate("probs", (4, MEBIBYTE), torch.uint8).write(0, mebibytes(4, 2))
    answer.put("aux", mebibytes(1, 3))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(patient.server.send, "t", answer, {})
        held.clear()
        received = patient.receive(MemoryBody.of(sending.result(20)))
    assert_same_bits(received, answer)


def test_an_answer_larger_than_the_memory_is_refused_with_the_numbers(small: Pair) -> None:
    with pytest.raises(RequestTooLarge, match=rf"takes {18 * MEBIBYTE} bytes .* has {16 * MEBIBYTE}: .* max_bytes"):
        small.body(rows=mebibytes(17))
    assert small.used == 0


def test_an_answer_nobody_fetched_is_taken_back(small: Pair) -> None:
    lost = [small.body(rows=mebibytes(8)) for _ in range(2)]
    time.sleep(1.0)
    received = small.receive(small.body(rows=mebibytes(16, 5)))
    for body in lost:
        with pytest.raises(TransferTimeout, match="take_timeout"):
            small.receive(body)
    assert bool((received["rows"] == 5).all())


def test_an_answer_that_was_fetched_is_not_taken_back(small: Pair) -> None:
    received = small.receive(small.body(rows=mebibytes(16, 5)))
    time.sleep(1.0)
    with pytest.raises(TransferTimeout, match="max_bytes"):
        small.body(rows=mebibytes(1))
    assert bool((received["rows"] == 5).all())


def test_as_many_transfers_as_there_are_slots_may_be_out(small: Pair) -> None:
    held = [small.receive(small.body(rows=torch.tensor([value]))) for value in range(128)]
    with pytest.raises(TransferTimeout):
        small.body(rows=torch.tensor([128]))
    assert [int(each["rows"]) for each in held] == list(range(128))
    held.clear()
    wait_until(lambda: small.used == 0)
    assert int(small.receive(small.body(rows=torch.tensor([129])))["rows"]) == 129


def test_a_ticket_is_good_once(small: Pair) -> None:
    reply = small.server.send("t", {"rows": torch.arange(4)}, {})
    small.receive(MemoryBody.of(reply))
    with pytest.raises(ProtocolError, match="received already"):
        small.receive(MemoryBody.of(reply))


def test_a_forked_child_gives_nothing_back(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    received = small.receive(small.body(rows=mebibytes(2)))
    monkeypatch.setattr("os.getpid", lambda: -1)
    received.clear()
    monkeypatch.undo()
    time.sleep(0.1)
    assert small.used == 2 * MEBIBYTE


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("name", 3),
        ("dtype", "F128"),
        ("shape", [-1]),
        ("shape", [1 << 61, 2]),
        ("shape", [1] * 9),
        ("shape", [20 << 20]),
        ("shape", "7"),
        ("memory", "cuda"),
        ("memory", ["host"]),
        ("offset", 0),
        ("offset", 1 << 61),
        ("offset", -64),
        ("offset", 4097),
        ("offset", 5.0),
        ("loans", {}),
        ("loans", {"host": -1}),
        ("loans", {"host": 1 << 40}),
        ("loans", {"host": "0"}),
        ("loans", {"cuda": 1 << 40}),
        ("loans", []),
        ("metadata", {"a": 1}),
        ("metadata", None),
        ("event", "zz"),
        ("tensors", [["rows", "F32", [1], "host", 4096]] * 2),
        ("tensors", 7),
    ],
)
def test_a_ticket_that_makes_no_sense_is_a_protocol_error(small: Pair, change: str, value: Any) -> None:
    ticket = json.loads(b"".join(small.server.send("t", {"rows": torch.ones(3)}, {}).parts))
    entry = ["name", "dtype", "shape", "memory", "offset"]
    if change in entry:
        ticket["tensors"][0][entry.index(change)] = value
    else:
        ticket[change] = value
    with pytest.raises(ProtocolError):
        small.receive(MemoryBody(CONTENT_TYPE, json.dumps(ticket).encode()))


def test_no_more_is_promised_than_may_be_used() -> None:
    endpoint = listening(max_bytes=4 * MEBIBYTE, max_total_bytes=9 * MEBIBYTE)
    pairs = [Pair(endpoint), Pair(endpoint)]
    with pytest.raises(ConnectError, match=r"max_total_bytes, 9437184: raise it"):
        Pair(endpoint)
    pairs[0].close()
    wait_until(lambda: endpoint.reserved_bytes == 4 * MEBIBYTE)
    pairs.append(Pair(endpoint))
    for pair in pairs:
        pair.close()
    endpoint.close()
    wait_until(lambda: endpoint.reserved_bytes == 0)


def test_neither_side_can_cut_memory_off_and_nothing_has_a_name(small: Pair) -> None:
    assert isinstance(small.client, client.ShmClientChannel)
    maps = Path("/proc/self/maps")
    before = named_memory(maps)
    received = small.receive(small.body(rows=mebibytes(2, 1)))
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    memory = [int(link.name) for link in links if "memfd:eagle-target-shm" in str(link.readlink())]
    assert memory
    for descriptor in memory:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    assert named_memory(maps) == before
    assert bool((received["rows"] == 1).all())


def test_strangers_are_sent_away(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = small.endpoint
    name = endpoint.offer()["socket"]
    nobody = Invitation(bytes(NAME_BYTES), bytes(KEY_BYTES))
    with pytest.raises(ConnectError, match="expects another client"):
        enter(name, nobody)
    with pytest.raises(ConnectError, match="cannot be reached"):
        enter("0" * 32, nobody)
    monkeypatch.setattr("eagle_target_shm.doorway.peer_user", lambda _: os.geteuid() + 1)
    with pytest.raises(ConnectError, match="belongs to user"):
        enter(name, nobody)
    monkeypatch.undo()
    assert int(small.receive(small.body(rows=torch.tensor([4])))["rows"]) == 4


def test_another_user_is_not_let_in(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client's own look at the server, on this thread, is honest.
    here = threading.current_thread()
    monkeypatch.setattr(
        "eagle_target_shm.doorway.peer_user",
        lambda _: os.geteuid() + (threading.current_thread() is not here),
    )
    with pytest.raises(ConnectError):
        Pair(small.endpoint)


@pytest.mark.parametrize(
    ("field", "reason"), [("host", "another host"), ("network", "another container"), ("user", "runs as user")]
)
def test_a_server_elsewhere_is_refused_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, field: str, reason: str
) -> None:
    endpoint = listening()
    monkeypatch.setattr(server, "this_host", lambda: {**this_host(), field: "other"})
    with pytest.raises(ConnectError, match=f"the server .*{reason}"):
        Pair(endpoint)
    with pytest.raises(ConnectError, match=f"the client .*{reason}"):
        endpoint.accept({**this_host(), field: "other"}, reached_at="127.0.0.1")
    assert endpoint.reserved_bytes == 0
    endpoint.close()


def test_memory_that_is_not_the_servers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = listening()
    monkeypatch.setattr("eagle_target_shm.segment.Segment.write_probe", lambda *_: None)
    with pytest.raises(ConnectError, match="is not what the server wrote to"):
        Pair(endpoint)
    wait_until(lambda: endpoint.reserved_bytes == 0)
    endpoint.close()


def test_a_transfer_before_the_client_has_come_and_after_it_went_is_an_error() -> None:
    endpoint = listening()
    channel, _ = endpoint.accept(this_host(), reached_at="127.0.0.1")
    with pytest.raises(ConnectError, match="not mapped"):
        channel.send("t", {"rows": torch.ones(3)}, {})
    channel.close()
    pair = Pair(endpoint)
    pair.client.close()
    wait_until(lambda: not isinstance(pair.server.new_tensors(), SharedTensors))
    with pytest.raises(ConnectError, match="open another"):
        pair.body(rows=torch.ones(3))
    assert not isinstance(pair.server.new_tensors(), SharedTensors)
    endpoint.close()


def test_what_clients_say_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    connections = []

    def enter_and_keep(name: str, invitation: Invitation) -> tuple[socket.socket, int]:
        connection, given = enter(name, invitation)
        connections.append(connection)
        return connection, given

    monkeypatch.setattr(client, "enter", enter_and_keep)
    endpoint = listening()
    pair = Pair(endpoint)
    connections[0].send((77).to_bytes(8, "little"))
    connections[0].send(((1 << 40) + 5).to_bytes(8, "little"))
    assert int(pair.receive(pair.body(rows=torch.tensor([4])))["rows"]) == 4
    connections[0].send(b"what")
    wait_until(lambda: pair.client.broken)
    pair.close()
    endpoint.close()


@pytest.mark.slow
def test_a_gigabyte() -> None:
    endpoint = listening()
    pair = Pair(endpoint)
    answer = pair.server.new_tensors()
    rows = answer.allocate("rows", (1 << 18, 1024), torch.float32)
    torch.arange(1 << 28, dtype=torch.float32, out=rows.out.view(-1))
    assert pair.used == 1 << 30
    received = pair.receive(MemoryBody.of(pair.server.send("t", answer, {})))
    assert torch.equal(received["rows"], rows.out)
    assert received["rows"].data_ptr() != rows.out.data_ptr()
    pair.close()
    endpoint.close()
