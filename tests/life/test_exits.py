"""Servers that end by themselves, and the statuses that all ways to end have."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from eagle_target.cli.main import main
from eagle_target.client import lease as client_presence
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import AdapterError, EngineDead
from eagle_target.server import run
from eagle_target.testing.tiny import EmbeddingRunner
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.faults.processes import ServerUnderFault, faulty_server, free_port
from tests.life.engines import CONTEXT
from tests.server.cases import PATIENCE_SECONDS, POISON, mapping_of, request_of, wait_until
from tests.server.http import Answer, ask, assert_problem, body_of, put_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from eagle_target.contract.runner import TargetForward


@pytest.fixture(autouse=True)
def early_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_presence, "FIRST_PAUSE_SECONDS", 0.05)


def connect(server: ServerUnderFault) -> RemoteEagle3TargetModel:
    return RemoteEagle3TargetModel.from_urls([server.url], transport="wire", encoding="probs")


def test_a_server_that_nobody_uses_ends() -> None:
    with faulty_server(exit_when_idle=1.0) as server:
        assert server.join() == 0


def test_a_server_is_idle_only_when_its_clients_are_gone() -> None:
    with faulty_server(exit_when_idle=1.5, channel_lease=1.5) as server:
        with connect(server) as target:
            target.set_vocab_mapping(mapping_of())
            for seed in range(2):
                # A long evaluation between two batches.
                assert not threading.Event().wait(2.0)
                assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))
        assert server.join() == 0


def test_a_server_ends_with_its_only_client() -> None:
    with faulty_server(exit_on_disconnect=True) as server:
        ask(server.url, "GET", "/v1/target")
        with connect(server) as target:
            target.set_vocab_mapping(mapping_of())
            target.generate_batch(**rows_of())
            assert server.is_ready()
        assert server.join() == 0


def test_a_server_ends_when_its_only_client_was_silent_for_the_lease() -> None:
    with faulty_server(exit_on_disconnect=True, channel_lease=0.4) as server:
        ask(server.url, "PUT", "/v1/clients/killed")
        assert server.join() == 0


def test_a_second_client_keeps_the_server() -> None:
    with faulty_server(exit_on_disconnect=True, channel_lease=1.5) as server:
        with connect(server), connect(server):
            pass
        assert not threading.Event().wait(2.0)
        assert server.is_ready()
        server.terminate()
        assert server.join() == 0


class Mortal(EmbeddingRunner):
    """Dies of token POISON, or never returns from it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        if bool((input_ids == POISON).any()):
            if self._how == "sticks":
                threading.Event().wait()
            raise EngineDead("no such process")
        return super().forward_eagle3(input_ids, seq_lens)


def _command(how: str, log: Path, flags: Sequence[str]) -> None:
    """`eagle-target serve` with another engine."""

    def load(*_: Any) -> Mortal:
        if how == "does not load":
            raise AdapterError("no such checkpoint")
        return Mortal(how)

    sys.argv = ["eagle-target", "serve", "--model", "mortal", *flags]
    with (
        mock.patch.object(run, "load_runner", load),
        log.open("w", encoding="utf-8") as stream,
        contextlib.redirect_stderr(stream),
    ):
        main()


@contextlib.contextmanager
def command(how: str, log: Path, *flags: str) -> Iterator[tuple[Any, str]]:
    port = free_port()
    process = CONTEXT.Process(target=_command, args=(how, log, [*flags, "--port", str(port)]), daemon=True)
    process.start()
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


def answer_of_poison(url: str) -> Answer:
    def is_ready() -> bool:
        with contextlib.suppress(OSError):
            return ask(url, "GET", "/ready").status == 200
        return False

    wait_until(is_ready)
    put_mapping(url, mapping_of())
    return ask(url, "POST", "/v1/supervision", body_of(request_of([4], poisonous=True)))


def status_of(process: Any) -> int | None:
    process.join(PATIENCE_SECONDS)
    return process.exitcode  # type: ignore[no-any-return]


def test_status_of_a_target_that_does_not_load(tmp_path: Path) -> None:
    with command("does not load", tmp_path / "log") as (process, _):
        assert status_of(process) == 1
    assert "error: cannot serve mortal: no such checkpoint" in (tmp_path / "log").read_text()


def test_status_of_an_engine_that_died(tmp_path: Path) -> None:
    with command("dies", tmp_path / "log", "--on-engine-failure", "exit") as (process, url):
        assert_problem(answer_of_poison(url), 503, "failed", "failed: no such process", retry_after="1")
        assert status_of(process) == 3
    log = (tmp_path / "log").read_text()
    assert "error: cannot serve mortal: no such process" in log
    assert "error: Traceback" not in log


def test_status_of_an_engine_that_died_once_too_often(tmp_path: Path) -> None:
    with command("dies", tmp_path / "log", "--max-restarts", "1") as (process, url):
        assert_problem(answer_of_poison(url), 503, "loading", r"no such process \(restart 1 of 1", retry_after="1")
        assert_problem(answer_of_poison(url), 503, "failed", "failed: no such process", retry_after="1")
        assert status_of(process) == 3


def test_status_of_an_engine_that_does_not_return(tmp_path: Path) -> None:
    with command("sticks", tmp_path / "log", "--forward-timeout", "0.3") as (process, url):
        assert_problem(answer_of_poison(url), 503, "stuck", "a forward did not return within 0.3 s", retry_after="1")
        assert status_of(process) == 4
    log = (tmp_path / "log").read_text()
    assert "thread eagle-target-engine:" in log
    assert "error: cannot serve mortal: a forward did not return within 0.3 s (forward_timeout)" in log


def test_status_of_a_server_that_nobody_uses(tmp_path: Path) -> None:
    with command("lives", tmp_path / "log", "--exit-when-idle", "0.2") as (process, _):
        assert status_of(process) == 0
    assert "draining: no client and no request for 0.2 s (exit_when_idle)" in (tmp_path / "log").read_text()
