"""A server does not stand open by accident, and TLS keeps its promises."""

from __future__ import annotations

import ssl
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from pydantic import SecretStr

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.config import ServerConfig
from eagle_target.errors import ConfigError, ConnectError
from eagle_target.server.middleware import is_loopback
from eagle_target.server.run import HttpServer
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.server import loopback_server
from tests.client.batches import expected_batch, rows_of
from tests.server.cases import TestRunner, mapping_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKEN = "correct-horse-battery-staple"


class Files:
    """An authority, a server's and a client's certificates, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.cert, self.key = _write(authority.issue_cert("127.0.0.1", "localhost"), folder, "server")
        self.client_cert, self.client_key = _write(authority.issue_cert("trainer.example"), folder, "client")
        self.other_cert, self.other_key = _write(authority.issue_cert("elsewhere.example"), folder, "other")
        self.stranger_cert, self.stranger_key = _write(trustme.CA().issue_cert("127.0.0.1"), folder, "stranger")


def _write(cert: trustme.LeafCert, folder: Path, name: str) -> tuple[Path, Path]:
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    cert.private_key_pem.write_to_path(str(key))
    return chain, key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("gpu-7", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "gpu-7", ""])
def test_an_open_server_is_refused_elsewhere(host: str) -> None:
    with pytest.raises(ConfigError, match=r"anybody who reaches .* token_file or EAGLE_TARGET_TOKEN.* insecure"):
        HttpServer(ServerConfig(model="m", host=host, port=0), TestRunner)


def test_the_command_refuses_to_stand_open(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from eagle_target.cli.main import main
    from eagle_target.server import log

    monkeypatch.setattr(log, "configure_logging", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["eagle-target", "serve", "--model", "m", "--host", "0.0.0.0", "--port", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "anybody who reaches 0.0.0.0" in capsys.readouterr().err


def test_tls_alone_lets_everybody_in_and_is_not_enough(files: Files) -> None:
    config = ServerConfig(model="m", host="0.0.0.0", port=0, tls_cert=files.cert, tls_key=files.key)
    with pytest.raises(ConfigError, match="anybody who reaches"):
        HttpServer(config, TestRunner)


@pytest.mark.parametrize("given", ["token", "certificates", "insecure"])
def test_what_lets_a_server_listen_elsewhere(files: Files, given: str, caplog: pytest.LogCaptureFixture) -> None:
    ways: dict[str, dict[str, Any]] = {
        "token": {"token": SecretStr(TOKEN)},
        "certificates": {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.ca},
        "insecure": {"insecure": True},
    }
    HttpServer(ServerConfig(model="m", host="0.0.0.0", port=0, **ways[given]), TestRunner).close()
    assert ("in the clear" in caplog.text) == (given == "token")


@pytest.mark.parametrize("transport", ["wire", "inprocess"])
def test_batches_over_tls(files: Files, transport: str) -> None:
    with loopback_server(tls_cert=files.cert, tls_key=files.key, token=TOKEN) as server:
        assert server.url.startswith("https://")
        with RemoteEagle3TargetModel.from_urls(
            [server.url], transport=transport, encoding="probs", token=TOKEN, ca_file=files.ca
        ) as target:
            target.set_vocab_mapping(mapping_of())
            for seed in range(4):
                rows = rows_of(seed, batch=4, seq=64)
                assert_same_batch(target.generate_batch(**rows), expected_batch(rows))


def test_a_large_answer_over_tls_has_the_same_bits(files: Files) -> None:
    rows = rows_of(0, batch=8, seq=2048)
    with (
        loopback_server(tls_cert=files.cert, tls_key=files.key) as server,
        RemoteEagle3TargetModel.from_urls(
            [server.url], transport="wire", encoding="probs", ca_file=files.ca, rows="all"
        ) as target,
    ):
        target.set_vocab_mapping(mapping_of())
        assert_same_batch(target.generate_batch(**rows), expected_batch(rows, rows="all"))


@pytest.mark.parametrize("kind", ["unknown authority", "another name"])
def test_a_server_that_cannot_be_trusted_gets_no_token(files: Files, kind: str) -> None:
    cert, key = (files.stranger_cert, files.stranger_key) if kind[0] == "u" else (files.other_cert, files.other_key)
    with (
        loopback_server(tls_cert=cert, tls_key=key, token=TOKEN) as server,
        pytest.raises(ConnectError, match=r"CERTIFICATE_VERIFY_FAILED|certificate"),
    ):
        RemoteEagle3TargetModel.from_urls([server.url], ca_file=files.ca, token=TOKEN, ready_timeout=0)


def test_plain_http_to_a_tls_server_is_no_connection(files: Files) -> None:
    with (
        loopback_server(tls_cert=files.cert, tls_key=files.key) as server,
        pytest.raises(ConnectError),
    ):
        RemoteEagle3TargetModel.from_urls([server.url.replace("https", "http")], ready_timeout=0)


def test_clients_with_certificates_only(files: Files) -> None:
    with loopback_server(tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.ca) as server:
        with RemoteEagle3TargetModel.from_urls(
            [server.url], encoding="probs", ca_file=files.ca, client_cert=files.client_cert, client_key=files.client_key
        ) as target:
            target.set_vocab_mapping(mapping_of())
            assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        stranger: dict[str, Any] = {"client_cert": files.stranger_cert, "client_key": files.stranger_key}
        for given in ({}, stranger):
            with pytest.raises(ConnectError):
                RemoteEagle3TargetModel.from_urls([server.url], ca_file=files.ca, ready_timeout=0, **given)


def test_old_tls_is_refused(files: Files) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(files.ca)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        loopback_server(tls_cert=files.cert, tls_key=files.key) as server,
        pytest.raises(OSError, match=r"(?i)ssl|tls|protocol"),
    ):
        urllib.request.urlopen(f"{server.url}/health", context=old, timeout=10)


def _encrypted(files: Files, folder: Path) -> dict[str, Any]:
    key = folder / "encrypted.key"
    key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    return {"tls_cert": files.cert, "tls_key": key}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda files, _: {"tls_cert": files.cert}, "both tls_cert and tls_key"),
        (lambda files, _: {"tls_client_ca": files.ca}, "both tls_cert and tls_key"),
        (lambda files, _: {"tls_cert": files.cert, "tls_key": files.client_key}, "cannot use .*server.pem"),
        (lambda files, folder: {"tls_cert": folder / "absent", "tls_key": files.key}, "cannot use .*absent"),
        (_encrypted, "cannot use .*encrypted.key"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    files: Files, tmp_path: Path, settings: Callable[[Files, Path], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HttpServer(ServerConfig(model="m", port=0, **settings(files, tmp_path)), TestRunner)


def test_a_clients_files_that_cannot_be_used_are_named(files: Files, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"client_cert": files.client_cert}, "both client_cert and client_key"),
        ({"ca_file": tmp_path / "absent"}, "cannot use .*absent"),
    ]
    for given, message in wrong:
        with pytest.raises(ConfigError, match=message):
            RemoteEagle3TargetModel.from_urls(["https://127.0.0.1:1"], **given)


def test_a_password_in_a_url_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="holds no password") as caught:
        RemoteEagle3TargetModel.from_urls(["http://me:secret@127.0.0.1:1"])
    assert "secret" not in str(caught.value)
