"""Servers that are started, and ended; their memory; workers that are gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import urllib3

from eagle_target.bench.launching import run_server, serve_command
from eagle_target.bench.processes import MB, Worker, memory, read_status
from eagle_target.bench.server_memory import METRIC, MetricsMemory, ProcessMemory, process_tree, read_metric
from eagle_target.errors import BenchmarkError
from eagle_target.testing.server import embedding_process

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.testing.fixtures import ServeOnLoopback

GONE_SECONDS = 30.0


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_started_server_serves_and_ends_with_the_block_even_if_that_fails(tiny_target: Path) -> None:
    command = serve_command(sys.executable, "hf", str(tiny_target), options=["dtype=float32"])
    server = contextlib.ExitStack()
    running = server.enter_context(run_server(command))
    status = urllib3.request("GET", f"{running.url}/ready", retries=False).status
    peak = ProcessMemory(running.process.pid).stop()
    with pytest.raises(KeyError), server:
        raise KeyError

    assert status == 200
    assert running.process.poll() == 0  # it was asked to end, and did
    assert peak is not None
    assert peak > 50


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot be run"), run_server([str(tmp_path / "python")]):
        pass
    with (
        pytest.raises(BenchmarkError, match="no adapter 'nothing'"),
        run_server(serve_command(sys.executable, "nothing", "model")),
    ):
        pass


def test_processes_that_a_server_started_end_with_it(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "sys.exit('broken')\n",
        encoding="utf-8",
    )
    with pytest.raises(BenchmarkError, match="broken"), run_server([sys.executable, str(script)]):
        pass

    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    deadline = time.monotonic() + GONE_SECONDS
    while is_there(child) and read_status(child, "VmRSS") is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_status(child, "VmRSS") is None  # gone, or waiting for its parent to take note


def test_a_tree_of_processes_has_the_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= {*process_tree(os.getpid())}
    finally:
        child.communicate(b"\n")


def test_a_server_tells_its_memory_itself(loopback_server: ServeOnLoopback) -> None:
    url = loopback_server().url
    with urllib3.PoolManager(retries=False) as http:
        told = read_metric(http, url, METRIC)
        assert read_metric(http, url, "no_such_metric") is None
        assert read_metric(http, "http://127.0.0.1:9", METRIC) is None
    watching = MetricsMemory(url)
    watching.start()
    peak = watching.stop()

    assert told is not None
    assert peak is not None
    # Memory of earlier tests may be given back between the two looks.
    assert told / MB == pytest.approx(peak, rel=0.6)


def test_the_memory_of_a_server_process_is_its_peak() -> None:
    with embedding_process() as server:
        counted = ProcessMemory(server.process.pid)
        counted.start()
        peak = counted.stop()

    assert peak is not None
    assert peak > 50
    assert ProcessMemory(server.process.pid).stop() is None


def test_a_worker_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text("import sys; sys.exit(3)", encoding="utf-8")
    with Worker("short", folder=tmp_path) as worker, pytest.raises(BenchmarkError, match="status 3"):
        worker.ask("anything")


def test_a_process_knows_its_memory() -> None:
    figures = memory()

    assert 0 < figures["rss_mb"] <= figures["peak_rss_mb"] * 1.01
