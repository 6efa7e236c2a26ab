"""The log: its two forms, whom a line is about, and what is never in it."""

from __future__ import annotations

import base64
import json
import logging
import re
import signal
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.request import SupervisionRequest
from eagle_target.errors import EngineDead
from eagle_target.protocol import messages
from eagle_target.server import log
from eagle_target.server.log import (
    JsonFormatter,
    LogContext,
    TextFormatter,
    configure_logging,
    hide_ids,
    log_context,
    printable,
)
from eagle_target.server.middleware import shown_path
from eagle_target.testing.server import ServerProcess, loopback_server, server_process
from eagle_target.testing.tiny import save_tiny_target, shuffled_mapping
from tests.server.cases import POISON, TestRunner, wait_until
from tests.server.http import ask, body_of, connected

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target.contract.runner import TargetForward

TOKEN = "correct-horse-battery-staple"
OTHER_TOKEN = "another-token-of-good-length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
# Numbers that nothing else in a log is: above every port that is chosen, and longer than parts of a time.
VOCAB = 66_000
MARKERS = (61_357, 62_483, 63_709, 64_577)
OUTSIDE = 987_654_321
SUPERVISE = {"method": "POST", "path": messages.SUPERVISION}


def request_with(*ids: int) -> SupervisionRequest:
    return SupervisionRequest(
        input_ids=torch.tensor(ids),
        seq_lens=(len(ids),),
        row_mask=torch.ones(len(ids), dtype=torch.bool),
        encoding="hidden",
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real command at level debug, in JSON; it has had good requests, bad ones and strangers."""
    folder = tmp_path_factory.mktemp("logged")
    target = save_tiny_target(folder / "target", vocab=VOCAB, layers=7, hidden=16)
    (folder / "tokens").write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    arguments = ["--model", str(target), "-o", "device=cpu", "--transport", "wire,shm"]
    arguments += ["--token-file", str(folder / "tokens"), "--log-format", "json", "--log-level", "debug"]
    with server_process(arguments) as server:
        _train(server.url)
        _misuse(server.url)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        yield server


def _train(url: str) -> None:
    mapping = shuffled_mapping(VOCAB, 50)
    rows = torch.tensor([MARKERS])
    ones = torch.ones_like(rows)
    for transport in ("wire", "shm"):
        with RemoteEagle3TargetModel.from_urls([url], token=TOKEN, transport=transport, encoding="probs") as target:
            target.set_vocab_mapping(mapping)
            target.generate_batch(rows, ones, ones)


def _misuse(url: str) -> None:
    headers = {**BEARER, messages.REQUEST_ID: "request-7", messages.CLIENT: "client-3"}
    refused = ask(url, "POST", messages.SUPERVISION, body_of(request_with(*MARKERS, OUTSIDE)), headers)
    assert (refused.status, str(OUTSIDE) in refused.json()["detail"]) == (422, True)
    assert ask(url, "POST", messages.SUPERVISION, b"x" * 9 + str(MARKERS).encode(), BEARER).status == 400
    assert ask(url, "GET", f"/{MARKERS[0]}-and-more-than-that", headers=BEARER).status == 404
    strange = {"Authorization": "Bearer wrong-token-of-good-length"}
    assert ask(url, "GET", messages.TARGET, headers=strange).status == 401
    basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
    assert ask(url, "GET", messages.STATUS, headers={"Authorization": f"Basic {basic}"}).status == 200
    with connected(url) as connection:
        connection.sendall(b"no HTTP at all\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")


def events_of(server: ServerProcess) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.splitlines()]


def test_every_line_is_an_object_with_time_level_logger_and_message(served: ServerProcess) -> None:
    for event in events_of(served):
        assert {"time", "level", "logger", "message"} <= {*event}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])


def test_uvicorns_lines_have_the_same_form(served: ServerProcess) -> None:
    lines = [event for event in events_of(served) if event["logger"].startswith("uvicorn")]
    assert [(event["level"], event["message"]) for event in lines] == [("warning", "Invalid HTTP request received.")]


def test_lines_about_a_request_have_its_id_and_its_client(served: ServerProcess) -> None:
    answered = [event for event in events_of(served) if event["logger"] == "eagle_target.server.middleware"]
    for event in answered:
        assert event["request"]
        assert event["client"]
    refused = next(event for event in answered if event["request"] == "request-7")
    assert refused["client"] == "client-3"
    assert (refused["level"], refused["status"], refused["problem"]) == ("info", 422, "contract")
    good = [event for event in answered if event["status"] == 200 and event["path"] == messages.SUPERVISION]
    assert [(event["level"], event["tokens"], event["transport"]) for event in good] == [
        ("debug", len(MARKERS), "wire"),
        ("debug", len(MARKERS), "shm"),
    ]
    stranger = next(event for event in answered if event["status"] == 401)
    assert (stranger["level"], stranger["problem"]) == ("warning", "unauthorized")


def test_the_log_has_neither_training_data_nor_tokens(served: ServerProcess) -> None:
    log = served.log
    assert "answered" in log
    for secret in (*MARKERS, OUTSIDE, TOKEN, OTHER_TOKEN, "wrong-token", base64.b64encode(TOKEN.encode()).decode()):
        assert str(secret) not in log, secret


class Careless(TestRunner):
    """An engine that names ids when it fails."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        raise IndexError(f"index {input_ids[0]} of {input_ids.tolist()} and {input_ids} is out of range, 99 left")


def test_an_engines_message_keeps_no_ids(caplog: pytest.LogCaptureFixture) -> None:
    with loopback_server(Careless) as server, caplog.at_level(logging.DEBUG):
        headers = {messages.REQUEST_ID: "request-8", messages.CLIENT: "client-4"}
        answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_with(*MARKERS)), headers)
        assert (answer.status, str(MARKERS[0]) in answer.body.decode()) == (500, True)
        wait_until(lambda: "answered" in caplog.text)
        page = ask(server.url, "GET", messages.STATUS).body.decode()
    assert "index # of [#, #, #, #] and tensor([#, #, #, #]) is out of range, 99 left" in caplog.text
    assert "IndexError: see the log" in page
    for marker in MARKERS:
        assert str(marker) not in caplog.text
        assert str(marker) not in page


class Dying(TestRunner):
    """An engine that dies of a request, and names its ids."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        raise EngineDead(f"the worker died of {input_ids.tolist()}") from KeyError(int(input_ids[0]))


def test_the_reason_an_engine_died_keeps_no_ids(caplog: pytest.LogCaptureFixture) -> None:
    with loopback_server(Dying) as server, caplog.at_level(logging.DEBUG):
        answer = ask(server.url, "POST", messages.SUPERVISION, body_of(request_with(*MARKERS)))
        ready = ask(server.url, "GET", messages.READY)
        page = ask(server.url, "GET", messages.STATUS)
    assert answer.status == 503
    assert "the engine stopped: EngineDead: the worker died of [#, #, #, #]" in caplog.text
    for marker in MARKERS:
        for text in (caplog.text, *(told.body.decode() for told in (answer, ready, page))):
            assert str(marker) not in text


def test_what_the_engines_threads_log_is_about_the_request() -> None:
    lines: list[str] = []
    handler = _Kept(lines)
    logging.getLogger().addHandler(handler)
    try:
        with loopback_server(TestRunner) as server:
            headers = {messages.REQUEST_ID: "request-9", messages.CLIENT: "client-5"}
            body = body_of(request_with(1, 2, POISON))
            assert ask(server.url, "POST", messages.SUPERVISION, body, headers).status == 500
    finally:
        logging.getLogger().removeHandler(handler)
    (failed,) = [line for line in lines if "a forward failed" in line]
    assert " ERROR eagle_target.server.engine.pipeline [request-9 client-5]: a forward failed\n  | Traceback" in failed


class _Kept(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.setFormatter(TextFormatter())
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


def record_of(message: str, *args: object, **extra: Any) -> logging.LogRecord:
    return logging.getLogger("some.logger").makeRecord(
        "some.logger", logging.WARNING, "file.py", 1, message, args, None, extra=extra
    )


def test_text_is_a_line_and_indented_ones() -> None:
    line = TextFormatter().format(record_of("first %s\nsecond", 1))
    assert re.fullmatch(r"\S+Z WARNING some\.logger: first 1\n  \| second", line)
    with log_context(LogContext("r", "c")):
        assert TextFormatter().format(record_of("x")).endswith(" WARNING some.logger [r c]: x")


def test_json_is_one_line_whatever_is_in_it() -> None:
    record = record_of('"quoted"\n\x1b[31m', fields={"path": "/x", "status": 200})
    record.exc_info = (ValueError, ValueError("two\nlines"), None)
    text = JsonFormatter().format(record)
    event = json.loads(text)
    assert "\n" not in text
    assert "\x1b" not in text
    assert (event["message"], event["path"], event["status"]) == ('"quoted"\n\x1b[31m', "/x", 200)
    assert event["exception"].endswith("ValueError: two\nlines")
    assert "request" not in event


def test_what_strangers_send_cannot_forge_a_line() -> None:
    assert printable("a\nb\x1b[31m\u2028c") == "a?b?[31m?c"
    assert len(printable("x" * 1000)) == 64
    assert shown_path("/v1/transports/shm/channels/0123456789abcdefghij") == "/v1/transports/shm/channels/*"
    assert shown_path("/a\nb" + "/c" * 50).startswith("/a?b/c")
    assert len(shown_path("/" + "c/" * 5000)) < 100


def test_ids_are_hidden_in_messages_and_not_in_line_numbers() -> None:
    text = 'Traceback\n  File "x.py", line 7, in f\n    f(7)\nValueError: 7 of 17, 700'
    hidden = 'Traceback\n  File "x.py", line 7, in f\n    f(#)\nValueError: # of 17, 700'
    assert hide_ids(text, torch.tensor([7, 8])) == hidden


def test_configuring_covers_warnings_and_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    before = (root.handlers[:], root.level, uvicorn.level)
    root.handlers[:] = []
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for variable in log.NO_PROGRESS_BARS:
        monkeypatch.setenv(variable, "1")
    try:
        configure_logging("json", "info")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("beware", stacklevel=1)
        thread = threading.Thread(target=[].pop, name="doomed")
        thread.start()
        thread.join()
        logging.getLogger("any").debug("not this")
    finally:
        logging.captureWarnings(capture=False)
        root.handlers[:], root.level = before[0], before[1]
        uvicorn.setLevel(before[2])
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["logger"] for event in events] == ["py.warnings", "eagle_target"]
    assert "beware" in events[0]["message"]
    assert events[1]["message"] == "thread doomed ended"
    assert "IndexError" in events[1]["exception"]
    assert log.FIELDS not in events[0]
