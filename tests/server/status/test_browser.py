"""The status page in a real headless Chromium."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from eagle_target.server.status import page
from eagle_target.testing.server import loopback_server
from tests.server.cases import TestRunner
from tests.server.traffic import busy_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from eagle_target.server.run import HttpServer
    from eagle_target.server.status.report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")

TOKEN = "correct-horse-battery-staple"
# Nothing but the page is asked for: neither updates nor anything else of the browser's own.
QUIET: tuple[str, ...] = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
QUIET += ("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr")
PATIENCE_SECONDS = 90


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with busy_server() as server:
        yield server


def browse(folder: Path, url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser that has never run before."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [str(CHROMIUM), *QUIET, *sandbox, f"--user-data-dir={folder / 'profile'}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page's script and policy ran into."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_the_page_is_shown_and_breaks_no_rule_of_its_own(server: HttpServer, tmp_path: Path) -> None:
    done = browse(tmp_path, server.url + "/", "--dump-dom")

    assert complaints(done) == []
    assert re.search(r'<span class="state ready">ready</span>', done.stdout)
    assert done.stdout.count("<figure>") == 2
    for client in server.engine.connected_clients():
        assert f"<code>{client.id}</code>" in done.stdout


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_it_can_be_looked_at(server: HttpServer, tmp_path: Path, size: tuple[int, int]) -> None:
    picture = tmp_path / "page.png"

    browse(tmp_path, server.url + "/", f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}")

    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == size
    assert len(content) > 10_000, "an empty page is smaller"


def test_its_content_is_renewed_in_place(server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, render = [], page.render

    def count(report: Report) -> str:
        shown.append(report)
        return render(replace(report, model=f"look {len(shown)}"))

    monkeypatch.setattr(page, "render", count)

    done = browse(tmp_path, server.url + "/", "--dump-dom", "--virtual-time-budget=12000")

    assert complaints(done) == []
    assert len(shown) >= 2
    assert f"<h1>look {len(shown)}</h1>" in done.stdout
    assert done.stdout.count("<main>") == 1
    assert 'class="stale"' not in done.stdout


def test_it_says_when_the_server_answers_no_more(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, render = [], page.render

    def fail_later(report: Report) -> str:
        shown.append(report)
        if len(shown) > 1:
            raise RuntimeError("no page")
        return render(report)

    monkeypatch.setattr(page, "render", fail_later)

    done = browse(tmp_path, server.url + "/", "--dump-dom", "--virtual-time-budget=16000")

    assert len(shown) > 2
    assert done.stdout.count('class="stale"') == 1
    assert "The server does not answer since" in done.stdout
    assert '<span class="state ready">ready</span>' in done.stdout, "what was known last stays"


def test_a_browser_gets_in_with_the_token_as_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, render = [], page.render

    def count(report: Report) -> str:
        shown.append(report)
        return render(replace(report, model=f"look {len(shown)}"))

    monkeypatch.setattr(page, "render", count)

    with loopback_server(TestRunner, token=TOKEN) as guarded:
        address = guarded.url.removeprefix("http://")
        refused = browse(tmp_path, f"http://{address}/", "--dump-dom")
        done = browse(tmp_path, f"http://me:{TOKEN}@{address}/", "--dump-dom", "--virtual-time-budget=12000")

    assert "look" not in refused.stdout
    assert complaints(done) == []
    assert len(shown) >= 2
    assert f"<h1>look {len(shown)}</h1>" in done.stdout
