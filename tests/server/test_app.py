"""Every route over real HTTP: answers, headers and problems."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from eagle_target.contract.request import SupervisionRequest
from eagle_target.errors import AdapterError
from eagle_target.protocol import messages
from eagle_target.protocol.tensors import encode_tensors
from eagle_target.server.run import HttpServer
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import shuffled_mapping
from tests.server.cases import (
    TestRunner,
    expected_of,
    mapping_of,
    request_of,
    wait_until,
)
from tests.server.http import (
    Answer,
    ask,
    assert_problem,
    body_of,
    connected,
    head_of,
    put_mapping,
    read_answer,
    read_until_closed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner

MAX_BODY_BYTES = 1 << 16
MAX_TOKENS = 500


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with loopback_server(TestRunner, max_body_bytes=MAX_BODY_BYTES, max_request_tokens=MAX_TOKENS) as running:
        put_mapping(running.url, mapping_of())
        yield running


@pytest.fixture
def url(server: HttpServer) -> str:
    return server.url


def supervise(url: str, body: bytes, **headers: str) -> Answer:
    return ask(
        url, "POST", messages.SUPERVISION, body, {name.replace("_", "-"): text for name, text in headers.items()}
    )


def body_with(metadata: Mapping[str, str] | None = None, /, **tensors: torch.Tensor) -> bytes:
    metadata = {"vocab_mapping": mapping_of().sha256, **(metadata or {})}
    return b"".join(encode_tensors(tensors, metadata))


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_health_and_readiness(url: str) -> None:
    assert (ask(url, "GET", "/health").status, ask(url, "GET", "/health").json()) == (200, {"status": "alive"})
    assert (ask(url, "GET", "/ready").status, ask(url, "GET", "/ready").json()) == (200, {"status": "ready"})


def test_the_handshake_tells_what_is_served(url: str) -> None:
    handshake = messages.read_handshake(ask(url, "GET", messages.TARGET).body)
    runner = TestRunner()
    assert handshake.target == runner.info
    assert handshake.aux_layer_ids == (1, 3, 4)
    assert handshake.fingerprint == handshake.served.fingerprint
    assert handshake.encodings == ("probs", "hidden", "logits")
    assert {"wire", "inprocess"} <= {*handshake.transports}
    assert handshake.limits.max_body_bytes == MAX_BODY_BYTES
    assert handshake.limits.max_request_tokens == MAX_TOKENS


def test_the_input_embedding_and_rows_of_the_head(url: str) -> None:
    runner = TestRunner(bias=True, logit_scale=0.5, soft_cap=30.0)
    answer = ask(url, "GET", messages.INPUT_EMBEDDINGS)
    assert answer.headers["content-type"] == messages.CONTENT_TYPE
    assert_same_bits(answer.tensors()[0], {"weight": TestRunner().input_embedding_weight()})
    with loopback_server(lambda: runner) as other:
        wanted = ids(7, 3, 200)
        answer = ask(other.url, "POST", messages.LM_HEAD, body_with(token_ids=wanted))
        head = TestRunner(bias=True).draft_head(wanted)
        assert head is not None
        assert head.bias is not None
        tensors, metadata = answer.tensors()
        assert_same_bits(tensors, {"weight": head.weight, "bias": head.bias})
        assert metadata == {"logit_scale": "0.5", "soft_cap": "30.0"}
        assert answer.headers[messages.FINGERPRINT.lower()] == other.engine.served.fingerprint


@pytest.mark.parametrize(
    ("tensors", "detail"),
    [
        ({}, "needs token_ids"),
        ({"token_ids": ids()}, "needs token_ids"),
        ({"token_ids": torch.zeros(2)}, "needs token_ids"),
        ({"token_ids": ids(1, 211)}, "0 to 210"),
        ({"token_ids": ids(-1)}, "0 to 210"),
        ({"token_ids": torch.zeros(212, dtype=torch.int64)}, "at most 211"),
    ],
)
def test_wrong_ids_of_the_head_are_refused(url: str, tensors: dict[str, torch.Tensor], detail: str) -> None:
    assert_problem(ask(url, "POST", messages.LM_HEAD, body_with(**tensors)), 422, "contract", detail)


def test_a_head_that_cannot_be_handed_out_is_a_problem() -> None:
    with loopback_server(lambda: TestRunner(plain_head=False)) as other:
        answer = ask(other.url, "POST", messages.LM_HEAD, body_with(token_ids=ids(1)))
        assert_problem(answer, 422, "contract", "use encoding 'probs' or 'logits'")
        put_mapping(other.url, mapping_of())
        answer = supervise(other.url, body_of(request_of([3], encoding="hidden")))
        assert_problem(answer, 422, "contract", "needs a plain LM head")


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_supervision_has_the_bits_of_the_co_located_target(server: HttpServer, encoding: Any) -> None:
    request = request_of([5, 1, 9], encoding=encoding)
    answer = supervise(server.url, body_of(request), Eagle_Target_Request_Id="batch 7/é".encode().decode("latin-1"))
    tensors, metadata = answer.tensors()
    assert answer.status == 200
    assert_same_bits(tensors, expected_of(request))
    headers = {name.lower(): value for name, value in answer.headers.items()}
    echoed = {
        messages.REQUEST_ID: "batch 7/é".encode().decode("latin-1"),
        messages.ANSWERED: messages.request_digest(request),
        messages.FINGERPRINT: server.engine.served.fingerprint,
        messages.MAPPING: mapping_of().sha256,
    }
    assert metadata == echoed
    assert {name: headers[name.lower()] for name in echoed} == echoed
    assert headers["content-type"] == messages.CONTENT_TYPE
    assert int(headers["content-length"]) == len(answer.body)
    stages = [stage.split(";dur=") for stage in headers["server-timing"].split(", ")]
    assert [name for name, _ in stages] == ["queue", "forward", "projection"]
    assert all(float(milliseconds) >= 0 for _, milliseconds in stages)


def test_an_answer_without_mapping_or_request_id(url: str) -> None:
    request = request_of([4], encoding="logits")
    body = b"".join(
        encode_tensors(
            {"input_ids": request.input_ids, "seq_lens": ids(4), "row_mask": request.row_mask}, {"encoding": "logits"}
        )
    )
    answer = supervise(url, body)
    headers = {name.lower(): value for name, value in answer.headers.items()}
    assert headers[messages.REQUEST_ID.lower()]
    assert messages.MAPPING.lower() not in headers
    assert_same_bits(answer.tensors()[0], expected_of(request))


def test_a_saved_answer_opens_with_the_stock_library(url: str, tmp_path: Path) -> None:
    request = request_of([6, 2])
    path = tmp_path / "answer.safetensors"
    path.write_bytes(supervise(url, body_of(request), Eagle_Target_Request_Id="saved").body)
    assert_same_bits(safetensors.torch.load_file(path), expected_of(request))
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata()[messages.REQUEST_ID] == "saved"


def test_a_request_of_the_stock_library_without_row_mask_gets_every_row_but_the_first_ones(url: str) -> None:
    input_ids = ids(*range(20, 27))
    body = safetensors.torch.save(
        {"input_ids": input_ids, "seq_lens": ids(3, 4)}, metadata={"vocab_mapping": mapping_of().sha256}
    )
    mask = torch.tensor([False, True, True, False, True, True, True])
    request = SupervisionRequest(input_ids=input_ids, seq_lens=(3, 4), row_mask=mask, mapping=mapping_of())
    assert_same_bits(supervise(url, body).tensors()[0], expected_of(request))


@pytest.mark.parametrize(
    ("tensors", "metadata", "detail"),
    [
        ({}, {}, "needs input_ids as an int64 vector, got nothing"),
        ({"input_ids": ids(1)}, {}, "needs seq_lens"),
        ({"input_ids": torch.zeros(3, dtype=torch.int32), "seq_lens": ids(3)}, {}, "needs input_ids.*int32"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "seq_lens": ids(3)}, {}, "needs input_ids"),
        ({"input_ids": ids(), "seq_lens": ids()}, {}, "non-empty"),
        ({"input_ids": ids(1, 2), "seq_lens": ids()}, {}, "0 lengths that add up to 0"),
        ({"input_ids": ids(1, 2), "seq_lens": ids(1)}, {}, "add up to the 2 tokens"),
        ({"input_ids": ids(1, 2), "seq_lens": ids(3, -1)}, {}, "must be positive"),
        ({"input_ids": ids(1, 2), "seq_lens": ids(2, 0)}, {}, "must be positive"),
        ({"input_ids": ids(1, 2), "seq_lens": ids(1 << 62, 1 << 62)}, {}, "add up to"),
        ({"input_ids": ids(1, 211), "seq_lens": ids(2)}, {}, "input_ids has 211 at token 1"),
        ({"input_ids": ids(-1, 2), "seq_lens": ids(2)}, {}, "input_ids has -1 at token 0"),
        ({"input_ids": ids(1, 2), "seq_lens": ids(2), "row_mask": ids(1, 0)}, {}, "row_mask must be.*bool"),
        ({"input_ids": ids(1), "seq_lens": ids(1), "row_mask": torch.ones(2).bool()}, {}, "row_mask"),
        ({"input_ids": ids(1), "seq_lens": ids(1), "loss": ids(1)}, {}, r"unknown tensors \['loss'\]"),
        ({"input_ids": ids(1), "seq_lens": ids(1)}, {"encoding": "zip"}, "encoding must be one of.*'zip'"),
        ({"input_ids": ids(1), "seq_lens": ids(1)}, {"probs_dtype": "int8"}, "probs_dtype must be.*'int8'"),
    ],
)
def test_a_request_that_breaks_the_contract_is_refused(
    url: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str], detail: str
) -> None:
    assert_problem(supervise(url, body_with(metadata, **tensors)), 422, "contract", detail)


def test_probs_without_a_mapping_are_refused(url: str) -> None:
    body = b"".join(encode_tensors({"input_ids": ids(1), "seq_lens": ids(1)}, {}))
    assert_problem(supervise(url, body), 422, "invalid-vocab-mapping", "needs a vocabulary mapping")


def test_too_many_tokens_are_refused(url: str) -> None:
    answer = supervise(url, body_of(request_of([MAX_TOKENS + 1])))
    assert_problem(answer, 413, "too-many-tokens", "has 501 tokens, this server takes 500")
    assert supervise(url, body_of(request_of([MAX_TOKENS]))).status == 200


def good_body() -> bytes:
    return body_of(request_of([4]))


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "nothing"),
        (b"GIF89a", "474946383961"),
        (b"\xff" * 100, "length of a safetensors header"),
        (b"\x08" + b"\x00" * 7 + b"not json", "not JSON"),
        (b"\x02" + b"\x00" * 7 + b"[]", "not a JSON object"),
        (good_body()[:-1], "its header says"),
        (good_body() + b"\x00", "its header says"),
        (good_body()[:40], "ends inside its header"),
        (good_body().replace(b'"I64"', b'"I33"'), "no valid dtype"),
        (good_body().replace(b'"shape":[4]', b'"shape":[5]', 1), "does not fill"),
        (good_body().replace(b'"data_offsets":[0,32]', b'"data_offsets":[8,40]', 1), "no holes or overlaps"),
    ],
    ids=range(11),
)
def test_a_body_that_is_not_safetensors_is_refused(url: str, body: bytes, detail: str) -> None:
    assert_problem(supervise(url, body), 400, "malformed-body", detail)
    assert_problem(ask(url, "POST", messages.LM_HEAD, body), 400, "malformed-body", detail)
    assert_problem(ask(url, "PUT", messages.VOCAB_MAPPINGS + "/0", body), 400, "malformed-body", detail)


def test_a_mapping_is_stored_under_its_hash_only(url: str) -> None:
    mapping = mapping_of(5)
    request = request_of([3], mapping=mapping)
    answer = supervise(url, body_of(request))
    assert_problem(answer, 409, "unknown-vocab-mapping", f"no vocabulary mapping '{mapping.sha256}': PUT it to")
    body = b"".join(messages.encode_mapping(mapping))
    answer = ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/{'0' * 64}", body)
    assert_problem(answer, 422, "invalid-vocab-mapping", f"hash is {mapping.sha256}, the path says '0000")
    for _ in range(2):
        answer = ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/{mapping.sha256}", body)
        assert (answer.status, answer.body) == (204, b"")
    assert_same_bits(supervise(url, body_of(request)).tensors()[0], expected_of(request))


def test_bytes_a_token_are_told_and_true(url: str) -> None:
    mapping = mapping_of(6)
    ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/{mapping.sha256}", b"".join(messages.encode_mapping(mapping)))
    answer = ask(url, "GET", f"{messages.VOCAB_MAPPINGS}/{mapping.sha256}").json()
    assert answer["draft_vocab_size"] == mapping.draft_vocab_size
    told = answer["bytes_per_token"]
    handshake = messages.read_handshake(ask(url, "GET", messages.TARGET).body)
    assert handshake.bytes_per_token == {name: told[name] for name in ("hidden", "logits")}
    for encoding in handshake.encodings:
        request = request_of([9], mapping=mapping, encoding=encoding)  # type: ignore[arg-type]
        request = replace(request, row_mask=torch.ones(9, dtype=torch.bool))
        tensors, _ = supervise(url, body_of(request)).tensors()
        assert sum(tensor.nbytes for tensor in tensors.values()) == 9 * told[encoding]


def test_mappings_that_are_wrong_are_refused(url: str) -> None:
    other = shuffled_mapping(100, 10)
    answer = ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/{other.sha256}", b"".join(messages.encode_mapping(other)))
    assert_problem(answer, 422, "invalid-vocab-mapping", "vocabulary of 100, the target's has 211")
    answer = ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/0", body_with(selected_token_ids=ids(1)))
    assert_problem(answer, 422, "contract", "has selected_token_ids and selected_token_mask")
    wrong = body_with(selected_token_ids=ids(1, 1), selected_token_mask=torch.ones(211).bool())
    assert_problem(
        ask(url, "PUT", f"{messages.VOCAB_MAPPINGS}/0", wrong), 422, "invalid-vocab-mapping", "more than once"
    )


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", "/status", 404, "not-found"),
        ("GET", "/v2/target", 404, "not-found"),
        ("POST", "/v1/transports/wire", 404, "not-found"),
        ("GET", messages.SUPERVISION, 405, "method-not-allowed"),
        ("POST", messages.TARGET, 405, "method-not-allowed"),
        ("GET", messages.VOCAB_MAPPINGS + "/0", 409, "unknown-vocab-mapping"),
        ("POST", messages.VOCAB_MAPPINGS + "/0", 405, "method-not-allowed"),
        ("DELETE", "/v1/transports/wire/channels", 405, "method-not-allowed"),
    ],
)
def test_other_routes_and_methods(url: str, method: str, path: str, status: int, name: str) -> None:
    answer = ask(url, method, path)
    assert_problem(answer, status, name, "no vocabulary mapping" if status == 409 else f"{method} {path}: see docs/")
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", [messages.SUPERVISION, messages.LM_HEAD, "/v1/transports/inprocess/channels"])
def test_a_body_without_length_is_refused(url: str, path: str) -> None:
    with connected(url) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert_problem(read_answer(connection), 411, "length-required", "Content-Length")
        assert read_until_closed(connection) == b""


def test_an_oversized_body_is_refused_before_it_is_read(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(head_of(messages.SUPERVISION, MAX_BODY_BYTES + 1))
        assert_problem(read_answer(connection), 413, "body-too-large", "has 65537 bytes, this server takes 65536")
        assert read_until_closed(connection) == b""
    with connected(url) as connection:
        connection.sendall(head_of(messages.SUPERVISION, 10**18))
        assert_problem(read_answer(connection), 413, "body-too-large", f"has {10**18} bytes")


def test_a_slow_client_is_dropped() -> None:
    with loopback_server(TestRunner, body_timeout=0.3, headers_timeout=0.3) as server:
        body = good_body()
        with connected(server.url) as connection:
            connection.sendall(head_of(messages.SUPERVISION, len(body)) + body[:10])
            assert_problem(read_answer(connection), 408, "body-timeout", f"10 of {len(body)} bytes.* within 0.3 s")
            assert read_until_closed(connection) == b""
        for start in (b"", b"POST /v1/superv", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
            with connected(server.url) as connection:
                connection.sendall(start)
                assert read_until_closed(connection) == b""
        with connected(server.url) as connection:
            for _ in range(2):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert read_answer(connection).status == 200
            connection.sendall(b"GET /health HTT")
            assert read_until_closed(connection) == b""
        assert ask(server.url, "GET", "/ready").status == 200


def test_a_slow_engine_does_not_count_as_a_slow_client() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, body_timeout=0.2) as server, ThreadPoolExecutor(1) as pool:
        put_mapping(server.url, mapping_of())
        runner.gate.clear()
        answer = pool.submit(supervise, server.url, good_body())
        wait_until(lambda: runner.entered)
        time.sleep(0.5)
        runner.gate.set()
        assert answer.result(30).status == 200


def test_a_connection_is_used_again_after_a_problem(url: str) -> None:
    body = good_body()
    with connected(url) as connection:
        for path, status in ((messages.SUPERVISION, 200), ("/nowhere", 404), (messages.SUPERVISION, 200)):
            connection.sendall(head_of(path, len(body)) + body)
            assert read_answer(connection).status == status
        connection.sendall(head_of(messages.SUPERVISION, 3) + b"abc")
        assert read_answer(connection).status == 400
        connection.sendall(head_of("/health", 0, "GET"))
        assert read_answer(connection).status == 200


def test_a_transport_or_channel_that_is_not_there(url: str) -> None:
    answer = supervise(url, good_body(), Eagle_Target_Transport="pigeon")
    assert_problem(answer, 409, "transport-not-offered", r"'pigeon' is not offered, only \[.*'wire'\]")
    for headers in ({}, {"Eagle_Target_Channel": "x"}):
        answer = supervise(url, good_body(), Eagle_Target_Transport="inprocess", **headers)
        assert_problem(answer, 409, "unknown-channel", "no open 'inprocess' channel")
    answer = ask(url, "POST", "/v1/transports/pigeon/channels", b"{}")
    assert_problem(answer, 409, "transport-not-offered", "pigeon")
    answer = ask(url, "POST", "/v1/transports/inprocess/channels", b'{"process": "another"}')
    assert_problem(answer, 409, "transport-refused", "one process")
    for hello, detail in ((b"\xff", "not JSON"), (b"[]", "not a JSON object")):
        answer = ask(url, "POST", "/v1/transports/wire/channels", hello)
        assert_problem(answer, 400, "malformed-body", detail)
    answer = ask(url, "POST", "/v1/transports/wire/channels", b" " * 70000)
    assert_problem(answer, 413, "body-too-large", "65536")


def test_only_named_transports_are_offered() -> None:
    with loopback_server(TestRunner, transports=("inprocess",)) as server:
        assert [*ask(server.url, "GET", messages.TARGET).json()["transports"]] == ["inprocess"]
        assert_problem(supervise(server.url, good_body()), 409, "transport-not-offered", "'wire'")


def test_channels_open_up_to_the_limit_and_close() -> None:
    path = "/v1/transports/wire/channels"
    with loopback_server(TestRunner, max_channels=3) as server:
        put_mapping(server.url, mapping_of())
        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda _: ask(server.url, "POST", path, b"{}"), range(8))]
        opened = [answer.json()["channel"] for answer in answers if answer.status == 201]
        assert len({*opened}) == len(opened) == 3
        for answer in answers:
            if answer.status != 201:
                assert_problem(answer, 503, "too-many-channels", "3 channels are open")
        assert supervise(server.url, good_body(), Eagle_Target_Channel=opened[0]).status == 200
        answer = supervise(server.url, good_body(), Eagle_Target_Channel=opened[0], Eagle_Target_Transport="inprocess")
        assert_problem(answer, 409, "unknown-channel", "no open 'inprocess' channel")
        assert ask(server.url, "DELETE", f"/v1/transports/inprocess/channels/{opened[0]}").status == 204
        assert supervise(server.url, good_body(), Eagle_Target_Channel=opened[0]).status == 200
        for _ in range(2):
            assert ask(server.url, "DELETE", f"{path}/{opened[0]}").status == 204
        assert_problem(
            supervise(server.url, good_body(), Eagle_Target_Channel=opened[0]), 409, "unknown-channel", "open"
        )
        assert ask(server.url, "POST", path, b"").status == 201


def test_the_metrics_count() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner) as server, ThreadPoolExecutor(2) as pool:
        put_mapping(server.url, mapping_of())
        first = supervise(server.url, good_body())
        supervise(server.url, b"")
        supervise(server.url, body_of(request_of([3], mapping=mapping_of(9))))
        runner.gate.clear()
        waiting = [pool.submit(supervise, server.url, good_body())]
        wait_until(lambda: runner.entered == 2)
        waiting.append(pool.submit(supervise, server.url, good_body()))
        wait_until(lambda: server.engine.waiting == 1)
        text = ask(server.url, "GET", messages.METRICS).body.decode()
        for line in (
            'eagle_target_requests_total{outcome="answered",status="200"} 1.0',
            'eagle_target_requests_total{outcome="malformed-body",status="400"} 1.0',
            'eagle_target_requests_total{outcome="unknown-vocab-mapping",status="409"} 1.0',
            "eagle_target_tokens_total 4.0",
            f'eagle_target_sent_bytes_total{{transport="wire"}} {float(len(first.body))}',
            'eagle_target_stage_seconds_count{stage="forward"} 1.0',
            "eagle_target_queue_requests 1.0",
        ):
            assert line in text.splitlines()
        runner.gate.set()
        assert [answer.result(30).status for answer in waiting] == [200, 200]


def test_a_full_queue_is_a_problem_with_a_time_to_come_back() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        put_mapping(server.url, mapping_of())
        runner.gate.clear()
        running = pool.submit(supervise, server.url, good_body())
        wait_until(lambda: runner.entered)
        queued = pool.submit(supervise, server.url, good_body())
        wait_until(lambda: server.engine.waiting)
        answer = supervise(server.url, good_body())
        assert_problem(answer, 503, "queue-full", "1 requests wait, the queue holds 1", retry_after="1")
        assert_problem(ask(server.url, "GET", messages.INPUT_EMBEDDINGS), 503, "queue-full", "wait", retry_after="1")
        runner.gate.set()
        assert (running.result(30).status, queued.result(30).status) == (200, 200)
        assert supervise(server.url, good_body()).status == 200


def test_an_engine_failure_is_told_and_degrades() -> None:
    with loopback_server(TestRunner) as server:
        put_mapping(server.url, mapping_of())
        poison = body_of(request_of([4], poisonous=True))
        assert_problem(supervise(server.url, poison), 500, "engine-failed", "RuntimeError: a poisonous token")
        wait_until(lambda: server.engine.state == "degraded")
        answer = ask(server.url, "GET", "/ready")
        assert_problem(answer, 503, "degraded", "is degraded: RuntimeError: a poisonous token", retry_after="1")
        assert supervise(server.url, good_body()).status == 200
        wait_until(lambda: ask(server.url, "GET", "/ready").status == 200)


def test_an_error_nobody_foresaw_is_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(TestRunner):
        def input_embedding_weight(self) -> torch.Tensor:
            raise KeyError("a secret")

    with loopback_server(Broken) as server:
        answer = ask(server.url, "GET", messages.INPUT_EMBEDDINGS)
        assert_problem(answer, 500, "internal", "its log says why")
        assert b"secret" not in answer.body
        assert "a secret" in caplog.text


@contextlib.contextmanager
def started(load: Any, **settings: Any) -> Iterator[HttpServer]:
    """A server that may not be ready."""
    from eagle_target.config import ServerConfig

    server = HttpServer(ServerConfig(model="test", port=0, **settings), load)
    server.start()
    try:
        yield server
    finally:
        server.close()


def test_everything_but_health_and_metrics_waits_for_the_target() -> None:
    go = threading.Event()

    def load() -> TargetRunner:
        assert go.wait(30)
        return TestRunner()

    with started(load) as server:
        body = b"".join(messages.encode_mapping(mapping_of()))
        logits = b"".join(encode_tensors({"input_ids": ids(1, 2), "seq_lens": ids(2)}, {"encoding": "logits"}))
        requests: list[tuple[str, str, bytes | None]] = [
            ("GET", "/ready", None),
            ("GET", messages.TARGET, None),
            ("GET", messages.INPUT_EMBEDDINGS, None),
            ("POST", messages.LM_HEAD, body_with(token_ids=ids(1))),
            ("PUT", f"{messages.VOCAB_MAPPINGS}/{mapping_of().sha256}", body),
            ("POST", messages.SUPERVISION, logits),
        ]
        for method, path, content in requests:
            answer = ask(server.url, method, path, content)
            assert_problem(answer, 503, "loading", "^the server is loading$", retry_after="1")
        assert ask(server.url, "GET", "/health").status == 200
        assert ask(server.url, "GET", "/metrics").status == 200
        go.set()
        wait_until(lambda: ask(server.url, "GET", "/ready").status == 200)


def test_a_target_that_could_not_be_loaded_is_told() -> None:
    def load() -> TargetRunner:
        raise AdapterError("no such checkpoint")

    with started(load) as server:
        wait_until(lambda: server.engine.state == "failed")
        for path in ("/ready", messages.TARGET):
            answer = ask(server.url, "GET", path)
            assert_problem(answer, 503, "failed", "the server is failed: no such checkpoint", retry_after="1")
        assert ask(server.url, "GET", "/health").status == 200


def test_a_drain_answers_what_is_under_way_then_stops_listening() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner) as server, ThreadPoolExecutor(1) as pool:
        put_mapping(server.url, mapping_of())
        runner.gate.clear()
        running = pool.submit(supervise, server.url, good_body())
        wait_until(lambda: runner.entered)
        server.drain()
        assert_problem(ask(server.url, "GET", "/ready"), 503, "draining", "is draining", retry_after="1")
        assert_problem(supervise(server.url, good_body()), 503, "draining", "is draining", retry_after="1")
        runner.gate.set()
        assert_same_bits(running.result(30).tensors()[0], expected_of(request_of([4])))

        def stopped() -> bool:
            with contextlib.suppress(OSError):
                ask(server.url, "GET", "/health")
                return False
            return True

        wait_until(stopped)


def test_garbage_on_the_socket_does_not_disturb(url: str) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01", b"NONSENSE\r\n\r\n", b"\x00" * 1000, b"GET / HTTP/9.9\r\n\r\n"):
        with connected(url) as connection:
            connection.sendall(garbage)
            assert read_until_closed(connection).startswith(b"HTTP/1.1 400")
    both = b"POST /v1/supervision HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nbody"
    with connected(url) as connection:
        connection.sendall(both)
        assert read_until_closed(connection).startswith(b"HTTP/1.1 400")
    assert ask(url, "GET", "/ready").status == 200


def test_a_closed_server_leaves_no_thread() -> None:
    before = {*threading.enumerate()}
    for _ in range(3):
        with loopback_server(TestRunner) as server:
            put_mapping(server.url, mapping_of())
            assert supervise(server.url, good_body()).status == 200
        server.close()
    wait_until(lambda: {*threading.enumerate()} <= before, "the end of the server's threads")
