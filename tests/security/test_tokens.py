"""Tokens: who has none is told nothing, and no token is ever shown."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from eagle_target.auth import Tokens, read_tokens
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.config import ClientConfig, ServerConfig, dump_config, load_config
from eagle_target.errors import ConfigError, ServerError
from eagle_target.protocol import messages
from eagle_target.server.run import HttpServer
from eagle_target.targets import open_target
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.server.cases import TestRunner, mapping_of
from tests.server.http import ask, assert_problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKEN = "correct-horse-battery-staple"
OTHER = "another-token-of-good-length"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n\n{TOKEN}\n{OTHER}\n")
    return path


@pytest.fixture
def server(token_file: Path) -> Iterator[HttpServer]:
    with loopback_server(token_file=token_file, transports=("wire", "inprocess")) as server:
        yield server


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


ROUTES = [
    ("GET", messages.METRICS),
    ("GET", messages.TARGET),
    ("GET", messages.INPUT_EMBEDDINGS),
    ("POST", messages.LM_HEAD),
    ("PUT", messages.VOCAB_MAPPINGS + "/x"),
    ("POST", messages.SUPERVISION),
    ("POST", messages.TRANSPORTS + "/inprocess/channels"),
    ("DELETE", messages.TRANSPORTS + "/inprocess/channels/x"),
    ("PUT", messages.CLIENTS + "/x"),
    ("DELETE", messages.CLIENTS + "/x"),
    ("GET", "/nowhere"),
]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-token-of-good-length"),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(""),
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        bearer("\xff" * 20),
    ],
)
def test_a_stranger_is_told_nothing_on_any_route(server: HttpServer, headers: dict[str, str]) -> None:
    for method, path in ROUTES:
        answer = ask(server.url, method, path, b"{}" if method != "GET" else None, headers)

        assert_problem(answer, 401, "unauthorized", "with a token of its own only")
        assert answer.headers["www-authenticate"] == "Bearer", path
        assert answer.headers["connection"] == "close", path
        assert "embedding" not in answer.body.decode(), path


@pytest.mark.parametrize("path", [messages.HEALTH, messages.READY])
def test_probes_need_no_token(server: HttpServer, path: str) -> None:
    assert ask(server.url, "GET", path).status == 200


def test_why_a_target_failed_is_told_to_those_with_a_token_only(token_file: Path) -> None:
    def fail() -> TestRunner:
        raise RuntimeError("/secret/path is missing")

    server = HttpServer(ServerConfig(model="m", port=0, token_file=token_file), fail)
    server.start()
    try:
        while server.engine.state == "loading":
            pass
        assert "secret" not in ask(server.url, "GET", messages.READY).json()["detail"]
        assert "secret" in ask(server.url, "GET", messages.READY, headers=bearer(TOKEN)).json()["detail"]
    finally:
        server.close()


@pytest.mark.parametrize("token", [TOKEN, OTHER])
def test_each_token_lets_in(server: HttpServer, token: str) -> None:
    for path in (messages.TARGET, messages.METRICS):
        assert ask(server.url, "GET", path, headers=bearer(token)).status == 200
    assert ask(server.url, "GET", messages.TARGET, headers={"authorization": f"bEaReR  {token}"}).status == 200


def test_two_authorization_headers_are_none(server: HttpServer) -> None:
    from tests.server.http import connected, read_answer

    with connected(server.url) as connection:
        head = f"GET {messages.TARGET} HTTP/1.1\r\nHost: x\r\n" + f"Authorization: Bearer {TOKEN}\r\n" * 2 + "\r\n"
        connection.sendall(head.encode())
        assert read_answer(connection).status == 401


@pytest.mark.parametrize("transport", ["wire", "inprocess"])
@pytest.mark.parametrize("way", ["token", "file", "environment", "environment file"])
def test_a_client_with_the_token_gets_batches(
    server: HttpServer, token_file: Path, transport: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    if way == "token":
        given = {"token": TOKEN}
    elif way == "file":
        given = {"token_file": token_file}
    elif way == "environment":
        monkeypatch.setenv("EAGLE_TARGET_TOKEN", TOKEN)
    else:
        monkeypatch.setenv("EAGLE_TARGET_TOKEN_FILE", str(token_file))

    with RemoteEagle3TargetModel.from_urls([server.url], transport=transport, encoding="probs", **given) as target:
        target.set_vocab_mapping(mapping_of())
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        shown = f"{target!r} {target.model_info()} {vars(target)}"

    assert TOKEN not in shown


def test_settings_open_a_target_with_a_token(server: HttpServer) -> None:
    config = load_config(
        ClientConfig, path=None, environment={"EAGLE_TARGET_TOKEN": TOKEN}, overrides={"urls": server.url}
    )
    assert TOKEN not in f"{config!r} {config} {dump_config(config)} {config.model_dump()}"
    with open_target(config) as target:
        assert target.model_info()["engine"] == "embedding"


def test_a_client_without_the_token_is_refused_at_once_and_shows_none(server: HttpServer) -> None:
    with pytest.raises(ServerError, match="with a token of its own only") as caught:
        RemoteEagle3TargetModel.from_urls([server.url], token="wrong-token-of-good-length", ready_timeout=60)
    assert (caught.value.status, caught.value.problem) == (401, "unauthorized")
    assert "wrong-token" not in f"{caught.value!r}"


def test_tokens_are_exchanged_while_client_and_server_run(
    server: HttpServer, token_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mine = tmp_path / "mine"
    mine.write_text(TOKEN)
    new = "quite-a-new-token-of-length"
    with RemoteEagle3TargetModel.from_urls([server.url], token_file=mine, encoding="probs") as target:
        target.set_vocab_mapping(mapping_of())
        token_file.write_text(f"{new}\n{TOKEN}\n")
        target.generate_batch(**rows_of())
        mine.write_text(new)
        token_file.write_text(f"{new}\n")
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert ask(server.url, "GET", messages.TARGET, headers=bearer(TOKEN)).status == 401
        token_file.unlink()
        target.generate_batch(**rows_of())
    assert "the tokens read before stand" in caplog.text
    assert new not in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no token"),
        (b"# only\n\n  \n", "has no token"),
        (b"short\n", "tokens:1 is no token: 16 to 4096"),
        (f"{TOKEN}\nsecret with some spaces in it\n".encode(), "tokens:2 is no token"),
        (b"x" * 5000, "tokens:1 is no token"),
        (b"\xff" * 40, "not ASCII"),
        (b"a" * 16 + b"\x00" * 16, "is no token"),
        (b"#" * (2 << 20), "more than"),
    ],
)
def test_a_token_file_that_is_none_is_refused_without_being_shown(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=message) as caught:
        HttpServer(ServerConfig(model="m", port=0, token_file=path), TestRunner)
    assert "secret" not in str(caught.value)


def test_an_absent_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the token file .*absent: No such file"):
        read_tokens(tmp_path / "absent")


def test_a_token_that_is_none_is_refused_without_being_shown() -> None:
    for wrong in ("short", "with space in the middle"):
        with pytest.raises(ConfigError, match="the token is no token") as caught:
            HttpServer(ServerConfig(model="m", token=SecretStr(wrong)), TestRunner)
        assert wrong not in str(caught.value)
    with pytest.raises(ConfigError, match="'token'") as caught:
        load_config(ServerConfig, path=None, environment={}, overrides={"model": "m", "token": ["hush"]})
    assert "hush" not in str(caught.value)


def test_a_token_of_digits_is_a_token() -> None:
    environment = {"EAGLE_TARGET_TOKEN": "12345678901234567890"}
    config = load_config(ServerConfig, path=None, environment=environment, overrides={"model": "m"})
    assert config.token is not None
    assert config.token.get_secret_value() == "12345678901234567890"
    assert "1234" not in f"{config} {dump_config(config)}"


def test_tokens_show_only_their_file(token_file: Path) -> None:
    tokens = Tokens(TOKEN, token_file)
    assert repr(tokens) == f"Tokens({token_file})"
    assert tokens.accept(OTHER)
    assert not tokens.accept("")
