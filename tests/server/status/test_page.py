"""The status page without a browser: what it tells and to whom, in every state, and that nothing gets in unescaped."""

from __future__ import annotations

import base64
import re
import threading
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from eagle_target.config import ServerConfig
from eagle_target.errors import AdapterError
from eagle_target.protocol import messages
from eagle_target.server.run import HttpServer
from eagle_target.testing.server import loopback_server
from tests.server.cases import TestRunner, wait_until
from tests.server.http import Answer, ask, connected, read_until_closed
from tests.server.traffic import BATCHES, busy_server, client_of

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "correct-horse-battery-staple"
VOID = {"meta", "link"}
HOSTILE = '<script>alert("x")</script>&\'"'


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with busy_server() as server:
        yield server


@pytest.fixture(scope="module")
def page(server: HttpServer) -> Answer:
    return ask(server.url, "GET", messages.STATUS)


class Balanced(HTMLParser):
    """Reads a page, and minds that every element ends where it should."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(answer: Answer) -> Balanced:
    document = Balanced()
    document.feed(answer.body.decode())
    document.close()
    assert not document.open
    return document


def words_of(answer: Answer) -> str:
    return " ".join(read(answer).text)


def test_it_tells_what_is_served_and_done(server: HttpServer, page: Answer) -> None:
    words = words_of(page)
    for expected in (
        "embedding-211x16x8-seed0",
        "ready",
        "embedding 1",
        "float32, cpu",
        "1, 3, 4 of 8",
        server.engine.served.fingerprint,
        "probs, hidden, logits",
        "malformed-body",
        "headers-too-large",
        "projection",
        f"{2 * BATCHES + 1} requests",
    ):
        assert expected in words, expected
    rows = re.findall(r"<tr>\s*<td><code>(.+?)</code></td>", page.body.decode())
    clients = server.engine.connected_clients()
    assert {client.id for client in clients} <= {*rows}
    assert {client.transport for client in clients} >= {"wire", "shm"}


def test_it_asks_nobody_else_for_anything(page: Answer) -> None:
    document = read(page)
    for tag, attributes in document.found:
        for name in ("src", "href", "action", "style", "onclick", "onload", "xlink:href"):
            assert attributes.get(name) in (None, "data:,"), (tag, name)
    assert "url(" not in page.body.decode()
    assert "http://" not in page.body.decode().replace("http://www.w3.org", "")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["content-type"] == "text/html; charset=utf-8"


def test_it_renews_itself_with_and_without_scripts(page: Answer) -> None:
    text = page.body.decode()
    assert '<noscript><meta http-equiv="refresh" content="10"></noscript>' in text
    assert "setInterval" in text


def test_nothing_gets_in_unescaped() -> None:
    with loopback_server(TestRunner, model=HOSTILE) as server:
        info = server.engine.served.info.model_copy(update={"model": HOSTILE, "device": HOSTILE, "engine": HOSTILE})
        object.__setattr__(server.engine.served, "info", info)
        headers = {messages.CLIENT: "<b>me</b>"}
        ask(server.url, "POST", messages.SUPERVISION, b"", headers)
        answer = ask(server.url, "GET", messages.STATUS)
    text = answer.body.decode()
    assert "alert" in text
    assert "<script>alert" not in text
    assert "<b>me" not in text
    assert HOSTILE in words_of(answer)
    assert [tag for tag, _ in read(answer).found].count("script") == 1


def test_it_tells_why_a_target_is_not_served() -> None:
    def fail() -> TestRunner:
        raise AdapterError("no such folder: /models/x")

    with started(fail) as server:
        wait_until(lambda: server.engine.state == "failed")
        words = words_of(ask(server.url, "GET", messages.STATUS))
    assert "failed" in words
    assert "no such folder: /models/x" in words
    assert "some/model" in words
    assert "No client is connected." in words
    assert "No requests yet." in words


def test_it_is_there_while_the_target_loads() -> None:
    gate = threading.Event()

    def load() -> TestRunner:
        gate.wait(30)
        return TestRunner()

    with started(load) as server:
        answer = ask(server.url, "GET", messages.STATUS)
        gate.set()
    assert answer.status == 200
    assert "<title>loading: some/model</title>" in answer.body.decode()


class started:  # noqa: N801 - reads as the function it stands for
    """A server that need not become ready."""

    def __init__(self, load: Any, **settings: Any) -> None:
        self._server = HttpServer(ServerConfig(model="some/model", port=0, **settings), load)

    def __enter__(self) -> HttpServer:
        self._server.start()
        return self._server

    def __exit__(self, *_: object) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def guarded() -> Iterator[HttpServer]:
    with loopback_server(TestRunner, token=TOKEN) as server:
        yield server


def basic(password: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_a_browser_gets_in_with_the_token_as_password() -> None:
    with loopback_server(TestRunner, token=TOKEN) as server:
        stranger = ask(server.url, "GET", messages.STATUS)
        assert stranger.status == 401
        assert "embedding" not in stranger.body.decode()
        with connected(server.url) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            head = read_until_closed(connection).lower()
        assert b"\r\nwww-authenticate: bearer\r\n" in head
        assert b'\r\nwww-authenticate: basic realm="eagle-target' in head
        for user in ("anybody", "", "ü"):
            assert ask(server.url, "GET", messages.STATUS, headers=basic(TOKEN, user)).status == 200
        assert ask(server.url, "HEAD", messages.STATUS, headers=basic(TOKEN)).status == 200
        assert ask(server.url, "GET", messages.STATUS, headers={"Authorization": f"Bearer {TOKEN}"}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        basic("wrong-token-of-good-length"),
        basic(""),
        basic(TOKEN + "x"),
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(TOKEN.encode()).decode()},
        {"Authorization": "Basic " + base64.b64encode(b"\xff:\xff").decode()},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Digest {TOKEN}"},
    ],
)
def test_what_is_no_token_does_not_open_the_page(guarded: HttpServer, headers: dict[str, str]) -> None:
    assert ask(guarded.url, "GET", messages.STATUS, headers=headers).status == 401


@pytest.mark.parametrize(("method", "path"), [("GET", messages.METRICS), ("GET", messages.TARGET), ("POST", "/")])
def test_a_password_opens_nothing_else(guarded: HttpServer, method: str, path: str) -> None:
    answer = ask(guarded.url, method, path, b"" if method == "POST" else None, basic(TOKEN))
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_clients_that_leave_are_gone_from_it() -> None:
    with loopback_server(TestRunner) as server:
        with client_of(server, "wire"):
            (client,) = server.engine.connected_clients()
            assert client.id in words_of(ask(server.url, "GET", messages.STATUS))
        assert client.id not in words_of(ask(server.url, "GET", messages.STATUS))
