"""HTTP to one server: what goes wrong is one of our errors, soon, and leaves no connection behind."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from eagle_target.client.http import MAX_JSON_BYTES, ConnectionPool, ServerConnection
from eagle_target.errors import (
    ConfigError,
    ConnectError,
    EagleTargetError,
    ProtocolError,
    ServerError,
    TransferTimeout,
    Unavailable,
)
from eagle_target.protocol.problems import ProblemType, problem_document
from tests.client.stub import Received, reply, replying, stub
from tests.server.cases import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SOON_SECONDS = 20.0


@contextlib.contextmanager
def connected(url: str, timeout: float = 30.0) -> Iterator[ServerConnection]:
    connection = ServerConnection(url, timeout=timeout, max_connections=4)
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gpu-7:8001",
        "ftp://gpu-7:8001",
        "http://",
        "http://gpu-7:8001/v1",
        "http://gpu-7:8001?x=1",
        "http://h:99999",
        "http://h:abc",
        "http://[::1",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port is expected"):
        ServerConnection(url, timeout=1, max_connections=1)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with connected(url) as connection, pytest.raises(ConnectError, match=f"cannot connect to {url}.*is the server"):
        connection.request_json("GET", "/")


def test_a_name_nobody_has() -> None:
    with connected("http://no-such-host.invalid:1") as connection, pytest.raises(ConnectError, match="no-such-host"):
        connection.request_json("GET", "/")


def test_connections_are_used_again() -> None:
    with replying(reply(b"{}"), keep=True) as server, connected(server.url) as connection:
        for _ in range(5):
            assert connection.request_json("POST", "/x", {"a": 1}) == b"{}"
        assert server.accepted == 1
        assert [json.loads(request.body) for request in server.received] == [{"a": 1}] * 5


def test_a_connection_serves_one_request_at_a_time_however_often_its_last_answer_is_read() -> None:
    asked, go = threading.Event(), threading.Event()

    def respond(request: Received, connection: socket.socket) -> bool:
        if request.path == "/slow":
            asked.set()
            assert go.wait(SOON_SECONDS)
        connection.sendall(reply())
        return True

    with stub(respond) as server, connected(server.url) as connection, ThreadPoolExecutor(1) as pool:
        body = connection.request("PUT", "/")
        for _ in range(3):
            assert body.read_all(0) == b""
        slow = pool.submit(connection.request, "GET", "/slow")
        assert asked.wait(SOON_SECONDS)
        connection.request("GET", "/")
        assert server.accepted == 2
        go.set()
        slow.result(SOON_SECONDS)


def test_a_connection_the_server_closed_while_idle_is_replaced() -> None:
    with replying(reply(b"{}")) as server, connected(server.url) as connection:
        for count in range(1, 4):
            assert connection.request_json("GET", "/") == b"{}"
            assert server.accepted == count
            wait_until(lambda: server.open_connections == 0)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (b"", ConnectError, "broke"),
        (b"SSH-2.0-OpenSSH\r\n", ConnectError, "broke"),
        (b"\x00" * 70000, ConnectError, "broke"),
        (b"HTTP/1.1 200 OK\r\nContent-", ProtocolError, "has Content-Length ''"),
        (reply(b"{}")[:-1], ConnectError, "broke.*IncompleteRead"),
        (reply(b"{}", Content_Length="100"), ConnectError, "broke.*IncompleteRead"),
        (reply(b"{}", Content_Length="two"), ProtocolError, "Content-Length 'two'"),
        (reply(b"{}", Content_Length="-2"), ProtocolError, "Content-Length '-2'"),
        (reply(b"{}", Content_Length="-"), ProtocolError, "has Content-Length ''"),
        (reply(b"", Content_Length=str(MAX_JSON_BYTES + 1)), ProtocolError, "1048577 bytes where at most 1048576"),
        (reply(b"", 502, Content_Length="-"), Unavailable, "no body"),
        (reply(b"<html>", 503), Unavailable, "<html>"),
        (reply(b"Moved", 302), ServerError, "Moved"),
    ],
    ids=range(13),
)
def test_answers_that_are_wrong(answer: bytes, kind: type[EagleTargetError], message: str) -> None:
    with replying(answer) as server, connected(server.url) as connection:
        with pytest.raises(kind, match=message) as caught:
            connection.request_json("GET", "/")
        assert type(caught.value) is kind


def test_bytes_behind_an_answer_do_not_reach_the_next_one() -> None:
    with replying(reply(b"{}") + reply(b"[]"), keep=True) as server, connected(server.url) as connection:
        for _ in range(3):
            assert connection.request_json("GET", "/") == b"{}"


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", reply(b"", Content_Length="100") + b"{"])
def test_a_server_that_stops_answering(start: bytes) -> None:
    done = threading.Event()

    def respond(_: Received, connection: socket.socket) -> None:
        connection.sendall(start)
        done.wait(SOON_SECONDS)

    with stub(respond) as server, connected(server.url, timeout=0.3) as connection:
        with pytest.raises(TransferTimeout, match=r"did not answer within 0.3 s: raise timeout"):
            connection.request_json("GET", "/")
        done.set()


def test_a_body_that_keeps_coming_ends_at_the_deadline() -> None:
    def respond(_: Received, connection: socket.socket) -> None:
        connection.sendall(reply(b"", Content_Length=str(1 << 40)))
        piece = bytes(1 << 20)
        while True:
            connection.sendall(piece)

    with stub(respond) as server, connected(server.url, timeout=0.5) as connection:
        body = connection.request("GET", "/")
        buffer = memoryview(bytearray(8 << 20))

        def read() -> None:
            while True:
                body.readinto(buffer)

        with pytest.raises(TransferTimeout, match=f"of {1 << 40} bytes in time"):
            read()


@pytest.mark.parametrize("keep", ["keep-alive", "close"])
@pytest.mark.parametrize("start", ["nothing", "headers", "half"])
def test_closing_ends_a_request_under_way(start: str, keep: str) -> None:
    sent, done = threading.Event(), threading.Event()

    def respond(_: Received, connection: socket.socket) -> None:
        if start != "nothing":
            connection.sendall(reply(b"", Content_Length="100", Connection=keep))
        if start == "half":
            connection.sendall(b"x" * 50)
        sent.set()
        done.wait(SOON_SECONDS)

    with stub(respond) as server, connected(server.url) as connection, ThreadPoolExecutor(1) as pool:
        running = pool.submit(connection.request_json, "GET", "/")
        assert sent.wait(SOON_SECONDS)
        time.sleep(0.05)
        connection.close()
        with pytest.raises(ConnectError, match="was closed by this client"):
            running.result(SOON_SECONDS)
        done.set()
        with pytest.raises(ConnectError, match="was closed by this client"):
            connection.request_json("GET", "/")
        connection.close()


def test_a_connection_that_opens_while_its_client_closes_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SOON_SECONDS)
        pool = ConnectionPool("127.0.0.1", listener.getsockname()[1], None, kept=1)
        for _ in range(2):
            connection = pool.take(SOON_SECONDS)
            theirs, _ = listener.accept()
            pool.cut()
            with theirs:
                theirs.settimeout(SOON_SECONDS)
                assert theirs.recv(1) == b""
            connection.close()


def test_no_more_connections_are_kept_than_were_meant() -> None:
    with replying(reply(b"{}"), keep=True) as server:
        port = int(server.url.rpartition(":")[2])
        pool = ConnectionPool("127.0.0.1", port, None, kept=2)
        taken = [pool.take(SOON_SECONDS) for _ in range(3)]
        for connection in taken:
            pool.give_back(connection)
        assert [connection.sock is None for connection in taken] == [False, False, True]
        assert pool.take(SOON_SECONDS) is taken[1]
        pool.give_back(taken[1])
        pool.cut()
        assert all(connection.sock is None for connection in taken)


def test_a_body_that_is_dropped_closes_its_connection() -> None:
    closed = threading.Event()

    def respond(_: Received, connection: socket.socket) -> None:
        connection.sendall(reply(b"", Content_Length="100"))
        assert connection.recv(1) == b""
        closed.set()

    with stub(respond) as server, connected(server.url) as connection:
        connection.request("GET", "/").close()
        wait_until(closed.is_set)


@pytest.mark.parametrize("problem", [ProblemType.QUEUE_FULL, ProblemType.CONTRACT])
def test_a_problem_is_raised_as_its_error(problem: ProblemType) -> None:
    document = problem_document(problem, "what and how", status=problem.status, retry_after=7.0)
    body = json.dumps(document).encode()
    with replying(reply(body, problem.status, Retry_After="7")) as server, connected(server.url) as connection:
        with pytest.raises(problem.kind) as caught:
            connection.request_json("GET", "/")
        assert str(caught.value) == f"{server.url}: what and how"
