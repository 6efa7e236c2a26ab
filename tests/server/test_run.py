"""A server's process: signals, the port file, and what it says when it cannot serve."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from eagle_target.config import ServerConfig
from eagle_target.errors import AdapterError, ConfigError, PluginError
from eagle_target.protocol import messages
from eagle_target.server.run import HttpServer
from eagle_target.testing.comparison import assert_same_bits
from tests.faults.processes import faulty_server
from tests.server.cases import (
    PATIENCE_SECONDS,
    TestRunner,
    expected_of,
    mapping_of,
    request_of,
    wait_until,
)
from tests.server.http import ask, assert_problem, body_of, put_mapping

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner
    from tests.server.http import Answer

SLOW_LOAD = """
import sys, time
from pathlib import Path
from eagle_target.config import ServerConfig
from eagle_target.server.run import HttpServer
from eagle_target.testing.tiny import EmbeddingRunner

def load():
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    return EmbeddingRunner()

HttpServer(ServerConfig(model="slow", port=0, port_file=sys.argv[1]), load).run()
"""


def supervise(url: str) -> Answer:
    return ask(url, "POST", messages.SUPERVISION, body_of(request_of([4])))


def running_and_waiting(url: str) -> tuple[float, float]:
    text = ask(url, "GET", messages.METRICS).body.decode()
    running, waiting = (
        re.search(rf"^eagle_target_{name}_requests (\S+)$", text, re.MULTILINE) for name in ("engine", "queue")
    )
    assert running
    assert waiting
    return float(running[1]), float(waiting[1])


def is_draining(url: str) -> bool:
    answer = ask(url, "GET", "/ready")
    return answer.status == 503 and bool(answer.json()["type"].endswith(":draining"))


def test_sigterm_answers_what_is_under_way_and_refuses_what_comes() -> None:
    with (
        faulty_server({"delay": 1.0}, max_batch_tokens=4) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        put_mapping(server.url, mapping_of())
        under_way = [pool.submit(supervise, server.url) for _ in range(2)]
        wait_until(lambda: running_and_waiting(server.url) == (1, 1))
        server.terminate()
        wait_until(lambda: is_draining(server.url))
        assert_problem(supervise(server.url), 503, "draining", "is draining", retry_after="1")
        for answer in under_way:
            assert_same_bits(answer.result(PATIENCE_SECONDS).tensors()[0], expected_of(request_of([4])))
        assert server.join() == 0


@pytest.mark.parametrize("patience", ["a second signal", "drain_timeout"])
def test_a_drain_that_takes_too_long_is_cut_short(patience: str) -> None:
    drain_timeout = 600.0 if patience == "a second signal" else 0.2
    with (
        faulty_server({"delay": 600.0}, drain_timeout=drain_timeout, max_batch_tokens=4) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        put_mapping(server.url, mapping_of())
        stuck = [pool.submit(supervise, server.url) for _ in range(2)]
        wait_until(lambda: running_and_waiting(server.url) == (1, 1))
        server.terminate()
        if patience == "a second signal":
            wait_until(lambda: is_draining(server.url))
            server.terminate()
        assert server.join() == 0
        for answer in stuck:
            assert_problem(answer.result(PATIENCE_SECONDS), 503, "closed", "stopped before this request was answered")


def test_sigint_ends_an_idle_server() -> None:
    with faulty_server() as server:
        os.kill(int(server.process.pid or 0), signal.SIGINT)
        assert server.join() == 0


def test_the_port_file_is_there_while_the_target_still_loads(tmp_path: Path) -> None:
    port_file, go = tmp_path / "port", tmp_path / "go"
    process = subprocess.Popen([sys.executable, "-c", SLOW_LOAD, str(port_file), str(go)])
    try:
        wait_until(port_file.exists)
        url = f"http://127.0.0.1:{int(port_file.read_text())}"

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return ask(url, "GET", "/health").status == 200
            return False

        wait_until(answers)
        assert_problem(ask(url, "GET", "/ready"), 503, "loading", "is loading", retry_after="1")
        go.touch()
        wait_until(lambda: ask(url, "GET", "/ready").status == 200)
        assert [path.name for path in tmp_path.iterdir()] in (["port", "go"], ["go", "port"])
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_sigterm_while_loading_ends_the_server(tmp_path: Path) -> None:
    port_file, go = tmp_path / "port", tmp_path / "go"
    process = subprocess.Popen([sys.executable, "-c", SLOW_LOAD, str(port_file), str(go)])
    try:
        wait_until(port_file.exists)
        url = f"http://127.0.0.1:{int(port_file.read_text())}"

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return ask(url, "GET", "/health").status == 200
            return False

        wait_until(answers)
        process.terminate()
        go.touch()
        assert process.wait(PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_a_target_that_cannot_be_loaded_ends_the_command_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eagle_target", "serve", "--model", str(tmp_path / "none"), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 1
    assert re.match(r"error: cannot serve \S+none: ", ended.stderr.splitlines()[-1])
    assert "Traceback" not in ended.stderr


def failing() -> TargetRunner:
    raise AdapterError("no such checkpoint")


def test_run_raises_when_the_target_cannot_be_loaded() -> None:
    server = HttpServer(ServerConfig(model="missing", port=0), failing)
    with pytest.raises(AdapterError, match=r"^cannot serve missing: no such checkpoint$"):
        server.run()


def test_a_taken_port_is_a_setting_that_is_wrong() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            HttpServer(ServerConfig(model="x", port=port), TestRunner)


def test_a_port_file_that_cannot_be_written_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    server = HttpServer(ServerConfig(model="x", port=0, port_file=tmp_path / "none" / "port"), TestRunner)
    with pytest.raises(ConfigError, match=r"cannot write port_file .*port: No such file"):
        server.run()
    assert {*threading.enumerate()} <= before
    with socket.create_server(("127.0.0.1", server.port)):
        pass


def test_a_transport_that_cannot_be_offered_leaves_no_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PluginError, match="pigeon"):
        HttpServer(ServerConfig(model="x", port=port, transports=("pigeon",)), TestRunner)
    with pytest.raises(ConfigError, match=r"transport_options for \['pigeon'\]"):
        HttpServer(ServerConfig(model="x", port=port, transport_options={"pigeon": {}}), TestRunner)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_url_reaches_the_server(host: str, shown: str) -> None:
    try:
        server = HttpServer(ServerConfig(model="x", host=host, port=0, insecure=True), TestRunner)
    except ConfigError:
        if ":" in host:
            pytest.skip("this machine has no IPv6")
        raise
    try:
        assert server.url == f"http://{shown}:{server.port}"
        server.start()
        wait_until(lambda: ask(server.url, "GET", "/ready").status == 200)
    finally:
        server.close()
    server.close()


def test_a_server_that_never_started_closes() -> None:
    server = HttpServer(ServerConfig(model="x", port=0), TestRunner)
    server.close()
    server.close()
