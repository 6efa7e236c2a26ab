"""Data planes are reachable by an authenticated client alone: tried as another user, and from another host."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from eagle_target_nccl.gate import MAX_STRANGERS, NAME_BYTES
from eagle_target_shm.doorway import ADDRESS, CLIENT, GREETING, SERVER, Invitation, enter
from torch import distributed

from eagle_target.client.lease import ChannelControl
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import TransportRefused
from eagle_target.protocol import messages
from eagle_target.seals import NONCE_BYTES, SEAL_BYTES, new_key
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.faults.nccl_ends import proxied_groups
from tests.faults.processes import faulty_server, nothing_left_behind
from tests.security.strangers import NOBODY, as_stranger, listening, needs_another_user, other_host, stranger
from tests.server.cases import PATIENCE_SECONDS, mapping_of, wait_until
from tests.server.http import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TOKEN = "correct-horse-battery-staple"
CHANNELS = f"{messages.TRANSPORTS}/nccl/channels"
HELLO = {"backend": "tcp", "target_device": "cpu", "digest": "xxh3_128"}
# Connections of HTTP, and what a server's first forward opens.
SLACK_FILES = 32
# Strangers' processes take their time to start.
SETTINGS: dict[str, Any] = {
    "transports": ("nccl", "wire"),
    "transport_options": {"nccl": {"connect_timeout": PATIENCE_SECONDS}},
}


def connected(url: str, transport: str = "nccl", **options: Any) -> RemoteEagle3TargetModel:
    options = {"timeout": PATIENCE_SECONDS, "transport_options": SETTINGS["transport_options"], **options}
    target = RemoteEagle3TargetModel.from_urls([url], transport=transport, encoding="probs", **options)
    target.set_vocab_mapping(mapping_of())
    return target


def check_batch(target: RemoteEagle3TargetModel, transport: str = "nccl") -> None:
    assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
    assert target.model_info()["servers"][0]["transport"] == transport


def meddle(monkeypatch: pytest.MonkeyPatch, action: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Do something once, when a client has been told where to join, and before it goes there."""
    tell = ChannelControl.tell

    def tell_and_act(self: ChannelControl, message: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        told = tell(self, message, **options)
        if "join" not in message:
            return told
        monkeypatch.undo()
        return {**told, **action(told)}

    monkeypatch.setattr(ChannelControl, "tell", tell_and_act)


# What strangers do.


def list_store(say: Callable[[Any], None], host: str, port: int) -> None:
    """The keys of a torch store that anybody may read; none where there is no such store."""
    try:
        say(list(_store_at(host, port).list_keys()))
    except RuntimeError:
        say([])


def fill_store(say: Callable[[Any], None], host: str, port: int) -> None:
    """How many values anybody may store."""
    try:
        store = _store_at(host, port)
        store.set("filled", "x" * (1 << 20))
        say(int(store.num_keys()))
    except RuntimeError:
        say(0)


def _store_at(host: str, port: int) -> Any:
    timeout = timedelta(seconds=2)
    return distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, wait_for_workers=False, timeout=timeout
    )


def crowd(say: Callable[[Any], None], host: str, port: int) -> None:
    """Come before the client: many who say nothing, part of a name, or another's."""
    words = [b"", b"x", bytes(NAME_BYTES), b"GET / HTTP/1.1\r\n\r\n"]
    there = [socket.create_connection((host, port)) for _ in range(2 * MAX_STRANGERS)]
    for number, connection in enumerate(there):
        try:
            connection.sendall(words[number % len(words)])
        except OSError:
            # It was sent away.
            continue
    say(len(there))
    threading.Event().wait()


def pose_as_client(say: Callable[[Any], None], host: str, port: int, name: str) -> None:
    """Go where a client was told to go, with its name and without its key; say what comes of it."""
    with socket.create_connection((host, port)) as connection:
        connection.sendall(bytes.fromhex(name))
        received = connection.recv(NONCE_BYTES, socket.MSG_WAITALL)
        connection.sendall(secrets.token_bytes(NONCE_BYTES + SEAL_BYTES))
        connection.settimeout(PATIENCE_SECONDS)
        after: bytes | None = b""
        try:
            after = connection.recv(1 << 16)
        except ConnectionError:
            after = None
        say((len(received), after or b""))


def pose_as_server(say: Callable[[Any], None], host: str) -> None:
    """Wait for a client, follow the protocol without the key, and send made-up bytes."""
    with socket.create_server((host, 0)) as listener:
        say(listener.getsockname()[1])
        connection, _ = listener.accept()
        connection.recv(NAME_BYTES, socket.MSG_WAITALL)
        connection.sendall(secrets.token_bytes(NONCE_BYTES))
        connection.recv(NONCE_BYTES + SEAL_BYTES, socket.MSG_WAITALL)
        connection.sendall(bytes(SEAL_BYTES + (1 << 20)))
        threading.Event().wait()


def throw_back(say: Callable[[Any], None], host: str) -> None:
    """Pose as a server that gives a client its own words back."""
    with socket.create_server((host, 0)) as listener:
        say(listener.getsockname()[1])
        connection, _ = listener.accept()
        connection.recv(NAME_BYTES, socket.MSG_WAITALL)
        connection.sendall(bytes(NONCE_BYTES))
        answer = connection.recv(NONCE_BYTES + SEAL_BYTES, socket.MSG_WAITALL)
        connection.sendall(answer[NONCE_BYTES:])
        threading.Event().wait()


def knock(say: Callable[[Any], None], doors: list[tuple[str, int]]) -> None:
    """Which addresses and ports take a connection."""
    found = []
    for door in doors:
        try:
            with socket.create_connection(door, timeout=5):
                found.append(door)
        except OSError:
            continue
    say(found)


def open_without_token(say: Callable[[Any], None], url: str) -> None:
    """The answers to each transport's channels, and to the handshake that would say where doorways are."""
    routes = [(messages.TARGET, "GET")]
    for name in ("inprocess", "nccl", "shm", "wire"):
        path = f"{messages.TRANSPORTS}/{name}/channels"
        routes += [(path, "POST"), (f"{path}/x/messages", "POST"), (f"{path}/x", "PUT"), (f"{path}/x", "DELETE")]
    say({ask(url, method, path, None if method == "GET" else b"{}").status for path, method in routes})


def train(say: Callable[[Any], None], url: str, token: str) -> None:
    """Take a batch over nccl and say its total."""
    with connected(url, token=token) as target:
        batch = target.generate_batch(**rows_of())
        assert batch.target_probs is not None
        say((target.model_info()["servers"][0]["transport"], float(batch.target_probs.double().sum())))


@needs_another_user
def test_a_stranger_finds_no_store_and_no_port_beside_http() -> None:
    with faulty_server(**SETTINGS) as server, connected(server.url) as target:
        check_batch(target)
        ports = listening(int(server.process.pid or 0)) - {("127.0.0.1", server.port)}
        found = {port: as_stranger(list_store, *port) for port in ports}
        filled = {port: as_stranger(fill_store, *port) for port in ports}
        assert (found, filled) == ({}, {})


@needs_another_user
def test_a_crowd_of_strangers_does_not_keep_a_client_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_server(**SETTINGS) as server:
        held = server.fds()
        with contextlib.ExitStack() as strangers:

            def come_first(told: Mapping[str, Any]) -> Mapping[str, Any]:
                came = strangers.enter_context(stranger(crowd, "127.0.0.1", told["port"]))
                assert came == 2 * MAX_STRANGERS
                # Those who have not said whom they come for, and what the server needs anyway.
                assert server.fds() <= held + MAX_STRANGERS + SLACK_FILES
                return {}

            meddle(monkeypatch, come_first)
            with connected(server.url) as target:
                check_batch(target)
                # The door is shut behind the client, and the crowd is gone.
                assert listening(int(server.process.pid or 0)) == {("127.0.0.1", server.port)}
                wait_until(lambda: server.fds() <= held + SLACK_FILES, "the end of the crowd")


@needs_another_user
@pytest.mark.parametrize("transport", ["nccl", "nccl,wire"])
def test_who_has_a_client_s_name_and_not_its_key_gets_no_tensors(
    monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    with faulty_server(**SETTINGS) as server:
        heard: list[tuple[int, bytes]] = []

        def come_first(told: Mapping[str, Any]) -> Mapping[str, Any]:
            heard.append(as_stranger(pose_as_client, "127.0.0.1", told["port"], told["name"]))
            return {}

        meddle(monkeypatch, come_first)
        if transport == "nccl":
            with pytest.raises(TransportRefused, match=r"has not the key|cannot connect|closed the connection"):
                connected(server.url)
        else:
            with connected(server.url, transport) as target:
                check_batch(target, "wire")
        assert heard == [(NONCE_BYTES, b"")]
        # It spoiled one meeting, and the next is another.
        with connected(server.url) as target:
            check_batch(target)


@needs_another_user
@pytest.mark.parametrize("pose", [pose_as_server, throw_back])
def test_nothing_is_taken_from_who_poses_as_the_server(
    monkeypatch: pytest.MonkeyPatch, pose: Callable[..., None]
) -> None:
    with faulty_server(**SETTINGS) as server, stranger(pose, "127.0.0.1") as port:
        meddle(monkeypatch, lambda _: {"port": port})
        with pytest.raises(TransportRefused, match="has not the key"):
            connected(server.url)


def test_a_byte_changed_on_the_way_is_asked_for_again() -> None:
    with faulty_server(**SETTINGS) as server, proxied_groups() as groups, connected(server.url) as target:
        check_batch(target)
        with groups.in_the_midst(then="flip", after=7):
            check_batch(target)
        assert target.model_info()["traffic"]["retries"] == 1


def test_a_client_names_no_address_to_listen_at() -> None:
    with other_host() as host, loopback_server(**SETTINGS) as server:
        hello = {**HELLO, "address": host.gateway, "host": host.gateway, "reached_at": host.gateway}
        opened = ask(server.url, "POST", CHANNELS, json.dumps(hello).encode()).json()
        path = f"{CHANNELS}/{opened['channel']}/messages"
        told = ask(server.url, "POST", path, json.dumps({**hello, "join": True}).encode()).json()
        doors = listening(os.getpid())
        assert doors == {("127.0.0.1", server.port), ("127.0.0.1", told["port"])}
        assert as_stranger(knock, [(host.gateway, port) for _, port in doors], host=host) == []


def test_from_another_host_only_a_client_with_a_token_gets_tensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    with other_host() as host, loopback_server(host=host.gateway, token_file=tokens, **SETTINGS) as server:
        url = f"http://{host.gateway}:{server.port}"
        assert as_stranger(open_without_token, url, host=host) == {401}
        expected = expected_batch(rows_of()).target_probs
        assert expected is not None
        transport, total = as_stranger(train, url, TOKEN, host=host)
        assert (transport, total) == ("nccl", pytest.approx(float(expected.double().sum())))

        def come_first(told: Mapping[str, Any]) -> Mapping[str, Any]:
            assert listening(os.getpid()) == {(host.gateway, server.port), (host.gateway, told["port"])}
            assert as_stranger(knock, [(host.gateway, told["port"])], host=host) == [(host.gateway, told["port"])]
            assert as_stranger(crowd, host.gateway, told["port"], host=host) == 2 * MAX_STRANGERS
            return {}

        meddle(monkeypatch, come_first)
        with connected(url, token=TOKEN) as target:
            check_batch(target)
        assert listening(os.getpid()) == {(host.gateway, server.port)}


def test_channels_at_many_addresses_leave_nothing() -> None:
    settings: dict[str, Any] = {"host": "0.0.0.0", "insecure": True, "max_channels": 8}
    with loopback_server(**SETTINGS, **settings) as server:
        with connected(server.url) as target:
            check_batch(target)
        before = listening(os.getpid())
        with nothing_left_behind():
            for number in range(200):
                with connected(f"http://127.0.0.{number + 2}:{server.port}") as target:
                    if not number % 50:
                        check_batch(target)
        assert listening(os.getpid()) == before


def bind_name(say: Callable[[Any], None], name: str) -> None:
    """Take a doorway's name, and pose as the server to whoever comes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(ADDRESS + name)
        listener.listen()
        say("here")
        connection, _ = listener.accept()
        hello = connection.recv(1 << 10)
        memory = os.memfd_create("made up", os.MFD_ALLOW_SEALING)
        connection.send(hello[-NONCE_BYTES:] + bytes(SEAL_BYTES))
        socket.send_fds(connection, [GREETING], [memory])
        threading.Event().wait()


def come_through(say: Callable[[Any], None], name: str, guest: str) -> None:
    """Go to a doorway with a client's name, without its key; say what is handed over."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(PATIENCE_SECONDS)
        heard: list[Any] = []
        try:
            connection.connect(ADDRESS + name)
            connection.send(bytes.fromhex(guest) + bytes(NONCE_BYTES))
            heard.append(len(connection.recv(1 << 10)))
            connection.send(bytes(SEAL_BYTES))
            _, descriptors, _, _ = socket.recv_fds(connection, 1 << 10, 4)
            heard.append(len(descriptors))
        except OSError:
            pass
        say(heard)


def open_memory(say: Callable[[Any], None], process: int) -> None:
    """The files of a process that anybody may open."""
    opened = []
    for number in range(256):
        try:
            os.close(os.open(f"/proc/{process}/fd/{number}", os.O_RDWR))
            opened.append(number)
        except OSError:
            continue
    say(opened)


def memory_files(process: int) -> int:
    """Files of a process that are nameless memory of transport shm."""
    links = [path.readlink() for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]
    return sum("eagle-target-shm" in str(link) for link in links)


@needs_another_user
def test_another_user_neither_comes_through_shm_s_doorway_nor_opens_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with faulty_server(transports=("shm", "wire")) as server:
        heard: list[Any] = []
        open_channel = ChannelControl.open_channel

        def come_first(self: ChannelControl, hello: Mapping[str, Any]) -> Mapping[str, Any]:
            answer = open_channel(self, hello)
            name = ask(server.url, "GET", messages.TARGET).json()["transports"]["shm"]["socket"]
            heard.append(as_stranger(come_through, name, answer["name"]))
            return answer

        monkeypatch.setattr(ChannelControl, "open_channel", come_first)
        process = int(server.process.pid or 0)
        with connected(server.url, "shm") as target:
            # Nothing was said to it, and the client's place was not taken.
            check_batch(target, "shm")
            assert heard == [[]]
            assert memory_files(process) > 0
            assert as_stranger(open_memory, process) == []
            assert listening(process) == {("127.0.0.1", server.port)}


@pytest.mark.parametrize(
    "user", [pytest.param(NOBODY, marks=needs_another_user), None], ids=["another user", "this user"]
)
def test_who_takes_the_name_of_shm_s_doorway_is_not_taken_for_the_server(
    monkeypatch: pytest.MonkeyPatch, user: int | None
) -> None:
    name = secrets.token_hex(16)
    with (
        faulty_server(transports=("shm",)) as server,
        stranger(bind_name, name, user=user),
    ):
        monkeypatch.setattr("eagle_target_shm.client.enter", lambda _, invitation: enter(name, invitation))
        reason = "belongs to user" if user is not None else "has not the key"
        with pytest.raises(TransportRefused, match=reason):
            connected(server.url, "shm")


def test_who_has_a_client_s_name_at_shm_s_doorway_and_not_its_key_gets_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with faulty_server(transports=("shm", "wire")) as server:
        heard: list[Any] = []

        def come_first(name: str, invitation: Invitation) -> Any:
            heard.append(as_stranger(come_through, name, invitation.name.hex(), user=None))
            return enter(name, invitation)

        monkeypatch.setattr("eagle_target_shm.client.enter", come_first)
        with pytest.raises(TransportRefused, match="expects another client"):
            connected(server.url, "shm")
        # It heard the server's proof, which is of no use elsewhere, and then was sent away.
        assert heard == [[NONCE_BYTES + SEAL_BYTES, 0]]
        monkeypatch.undo()
        with connected(server.url, "shm") as target:
            check_batch(target, "shm")


def test_what_one_doorway_heard_is_of_no_use_at_another() -> None:
    invitation = Invitation(bytes(16), new_key())
    nonces = bytes(NONCE_BYTES), bytes(NONCE_BYTES)
    said = [invitation.seal(whose, name, *nonces) for whose in (SERVER, CLIENT) for name in ("one", "other")]
    assert len({*said}) == 4
