"""The remote target against real servers on loopback."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import trustme

from eagle_target.client import balancer
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.config import ClientConfig, ServerConfig
from eagle_target.errors import (
    AdapterError,
    ConfigError,
    ConnectError,
    ContractError,
    PluginError,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    TransferTimeout,
    Unavailable,
    VocabMappingError,
)
from eagle_target.protocol import messages
from eagle_target.server.run import HttpServer
from eagle_target.targets import open_target
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.client.stub import forwarding, reply, replying, stub, with_body
from tests.server.cases import POISON, TestRunner, mapping_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.contract.vocab_mapping import VocabMapping
    from tests.client.stub import Received
    from tests.server.http import Answer

SOON_SECONDS = 20.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with loopback_server(TestRunner) as running:
        yield running


@contextlib.contextmanager
def remote(*urls: str, mapping: VocabMapping | None = None, **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    usual = {"transport": "wire", "encoding": "probs", "timeout": 30.0, "ready_timeout": 30.0, "retry_timeout": 0.0}
    options = {**usual, **options}
    with RemoteEagle3TargetModel.from_urls(urls, **options) as target:
        target.set_vocab_mapping(mapping or mapping_of())
        yield target


@pytest.mark.parametrize("transport", ["wire", "inprocess", "auto"])
@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_batches_have_the_bits_of_the_co_located_target(server: HttpServer, transport: str, encoding: Any) -> None:
    with remote(server.url, transport=transport, encoding=encoding) as target:
        for seed in range(3):
            rows = rows_of(seed)
            expected = expected_batch(rows, encoding=encoding)
            assert_same_batch(target.generate_batch(**rows), expected)
            assert_same_batch(target.generate_batch_async(**rows).result(SOON_SECONDS), expected)


@pytest.mark.parametrize("transport", ["wire", "inprocess"])
def test_a_draft_of_the_whole_vocabulary_is_projected_here_alone(server: HttpServer, transport: str) -> None:
    vocab_size = EmbeddingRunner().info.vocab_size
    mapping = shuffled_mapping(vocab_size, vocab_size)
    with remote(server.url, transport=transport, encoding="hidden") as target:
        target.set_vocab_mapping(mapping)
        rows = rows_of(1)
        assert_same_batch(target.generate_batch(**rows), expected_batch(rows, mapping=mapping, encoding="hidden"))


@pytest.mark.parametrize("probs_dtype", [torch.bfloat16, torch.float16])
def test_options_reach_the_server(server: HttpServer, probs_dtype: torch.dtype) -> None:
    rows = rows_of(1)
    with remote(server.url, rows="all", probs_dtype=probs_dtype) as target:
        assert_same_batch(target.generate_batch(**rows), expected_batch(rows, rows="all", probs_dtype=probs_dtype))


def test_facts_about_the_target(server: HttpServer) -> None:
    with remote(server.url + "/", server.url) as target:
        target.generate_batch(**rows_of())
        info = target.model_info()
        json.dumps(info)
        assert info["vocab_size"] == 211
        assert info["aux_layer_ids"] == [1, 3, 4]
        assert info["fingerprint"] == server.engine.served.fingerprint
        (described,) = info["servers"]
        assert described == {
            "url": server.url,
            "transport": "wire",
            "transports_refused": {},
            "fallbacks": 0,
            "healthy": True,
            "failures": 0,
            "paused_seconds": 0.0,
            "outstanding": 0,
            "last_error": None,
        }
        assert info["traffic"]["requests"] == 1
        assert info["traffic"]["tokens"] == int(rows_of()["attention_mask"].sum())
        assert info["traffic"]["bytes_received"] > 0
        assert info["traffic"]["retries"] == 0
        assert torch.equal(target.input_embedding_weight(), EmbeddingRunner().input_embedding_weight())


def test_the_embedding_seeds_a_draft_and_is_fetched_anew(server: HttpServer) -> None:
    given = EmbeddingRunner().input_embedding_weight()
    with remote(server.url) as target:
        draft = torch.nn.Embedding(*given.shape)
        with torch.inference_mode():
            draft.weight = target.get_input_embeddings().weight
        assert torch.equal(draft.weight, given)
        optimizer = torch.optim.SGD(draft.parameters(), lr=1.0)
        torch.autograd.backward(draft(rows_of()["input_ids"]).square().sum())
        optimizer.step()
        assert not torch.equal(draft.weight, given)
        assert torch.equal(target.get_input_embeddings().weight, given)
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))


def test_both_servers_work_under_prefetch() -> None:
    runners = [TestRunner(delay=0.02) for _ in range(2)]
    items = [rows_of(seed) for seed in range(16)]
    with contextlib.ExitStack() as running:
        left = [*runners]
        urls = [running.enter_context(loopback_server(left.pop, max_batch_tokens=1)).url for _ in runners]
        target = running.enter_context(remote(*urls))
        batches = [*target.prefetch(items, depth=4)]
        assert all(described["outstanding"] == 0 for described in target.model_info()["servers"])
    for rows, batch in zip(items, batches, strict=True):
        assert_same_batch(batch, expected_batch(rows))
    # Each batch has two sequences, which a forward of one token keeps apart.
    assert sum(len(runner.forwards) for runner in runners) == 2 * 16
    assert min(len(runner.forwards) for runner in runners) >= 4


@pytest.mark.parametrize(
    ("other", "settings", "fields"),
    [
        ({"seed": 1}, {}, "model: embedding-211x16x8-seed0 != embedding-211x16x8-seed1"),
        ({"dtype": torch.bfloat16}, {}, "dtype: float32 != bfloat16"),
        ({"hidden_size": 8}, {}, "model: .*; hidden_size: 16 != 8"),
        ({}, {"aux_layer_ids": (0, 3, 4)}, r"aux_layer_ids: \(1, 3, 4\) != \(0, 3, 4\)"),
    ],
)
def test_servers_that_differ_are_refused_with_what_differs(
    server: HttpServer, other: dict[str, Any], settings: dict[str, Any], fields: str
) -> None:
    with loopback_server(lambda: EmbeddingRunner(**other), **settings) as second:
        message = f"^{server.url} and {second.url} serve different targets: {fields}$"
        with pytest.raises(ContractError, match=message), remote(server.url, second.url):
            pass


def test_a_loading_server_is_waited_for() -> None:
    go = threading.Event()

    def load() -> TargetRunner:
        assert go.wait(30)
        return TestRunner()

    loading = HttpServer(ServerConfig(model="x", port=0), load)
    loading.start()
    try:
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(RemoteEagle3TargetModel.from_urls, [loading.url], ready_timeout=60)
            with pytest.raises(ConnectError, match=f"^not ready after 0.3 s: {loading.url}: the server is loading$"):
                RemoteEagle3TargetModel.from_urls([loading.url], ready_timeout=0.3)
            assert not connecting.done()
            go.set()
            with connecting.result(SOON_SECONDS) as target:
                assert target.model_info()["vocab_size"] == 211
    finally:
        loading.close()


def test_a_server_that_failed_to_load_is_not_waited_for() -> None:
    def load() -> TargetRunner:
        raise AdapterError("no such checkpoint")

    failed = HttpServer(ServerConfig(model="x", port=0), load)
    failed.start()
    try:
        wait_until(lambda: failed.engine.state == "failed")
        with pytest.raises(ConnectError, match=f"cannot use {failed.url}: .*is failed: no such checkpoint"):
            RemoteEagle3TargetModel.from_urls([failed.url], ready_timeout=600)
    finally:
        failed.close()


def test_a_server_that_never_answers_is_not_waited_for_longer() -> None:
    done = threading.Event()
    with stub(lambda *_: done.wait(SOON_SECONDS)) as silent:
        with pytest.raises(ConnectError, match=r"not ready after 0.5 s: .*did not answer within 0.3 s"):
            RemoteEagle3TargetModel.from_urls([silent.url], timeout=0.3, ready_timeout=0.5)
        done.set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(b"<html>hello</html>"), "is no handshake"),
        (reply(b"{}"), "is no handshake: Field required"),
        (b"", "broke"),
    ],
)
def test_what_is_no_server_is_refused(answer: bytes, message: str) -> None:
    with replying(answer) as other, pytest.raises((ProtocolError, ConnectError), match=message):
        RemoteEagle3TargetModel.from_urls([other.url], ready_timeout=0.1)


def changed_handshake(server: HttpServer, **values: Any) -> Any:
    def change(received: Received, answer: Answer) -> Answer:
        if received.path != messages.TARGET:
            return answer
        body = json.dumps(answer.json() | values).encode()
        return with_body(answer, body)

    return forwarding(server.url, change)


def test_another_protocol_is_refused(server: HttpServer) -> None:
    with (
        changed_handshake(server, protocol=2) as other,
        pytest.raises(ProtocolError, match=r"speaks protocol 2 .*this client 1: install the same version"),
    ):
        RemoteEagle3TargetModel.from_urls([other.url])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "at least one server"),
        ({"urls": "http://x:1"}, "must be a list"),
        ({"urls": ["x:1"]}, "http://host:port"),
        ({"urls": ["http://x:1"], "model": "y"}, "no model beside it"),
        ({"rows": "some"}, "client settings: 'rows': .*'supervised' or 'all'"),
        ({"probs_dtype": torch.int8}, "'probs_dtype': .*'float32', 'bfloat16' or 'float16'"),
        ({"encoding": "zip"}, "'encoding': .*'hidden' or 'logits'"),
        ({"timeout": 0}, "'timeout': .*greater than 0"),
        ({"max_retrys": 1}, "max_retrys.*did you mean 'max_retries'"),
        ({"transport_options": {"wire": {"speed": 1}}}, "unknown option 'speed'"),
    ],
)
def test_wrong_settings_are_refused(server: HttpServer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemoteEagle3TargetModel.from_urls(**{"urls": [server.url], "transport": "wire", **options})


def test_the_encoding_by_default_is_the_smallest_that_every_server_gives(server: HttpServer) -> None:
    with remote(server.url, encoding="auto") as target:
        info = target.model_info()
        assert info["encoding"] == "hidden"
        assert info["bytes_per_token"]["hidden"] == target.info.hidden_size * 4 * 4 + 8
        hidden = target.generate_batch(**rows_of())
    with remote(server.url) as target:
        batch = target.generate_batch(**rows_of())
    assert hidden.target_probs is not None
    assert batch.target_probs is not None
    torch.testing.assert_close(hidden.target_probs, batch.target_probs)
    with (
        changed_handshake(server, encodings=("probs", "logits")) as other,
        remote(other.url, server.url, encoding="auto") as target,
    ):
        assert target.model_info()["encoding"] == "probs"


def test_transports_by_name_in_order_and_unknown_ones(server: HttpServer) -> None:
    with remote(server.url, transport="auto") as target:
        assert target.model_info()["servers"][0]["transport"] == "inprocess"
    with loopback_server(TestRunner, transports=("wire",)) as wired:
        with remote(wired.url, transport="inprocess,wire") as target:
            (described,) = target.model_info()["servers"]
            assert described["transport"] == "wire"
            assert described["transports_refused"] == {"inprocess": f"{wired.url} does not offer it"}
        with pytest.raises(ConnectError, match=r"no transport to .* works: \{'inprocess': .*does not offer it"):
            RemoteEagle3TargetModel.from_urls([wired.url], transport="inprocess", ready_timeout=60)
    with pytest.raises(PluginError, match="pigeon"):
        RemoteEagle3TargetModel.from_urls([server.url], transport="wire,pigeon")


def test_a_fallback_is_told(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    offers = {"wire": {}, "inprocess": {"process": "another"}}
    with changed_handshake(server, transports=offers) as other:
        with (
            caplog.at_level("INFO"),
            RemoteEagle3TargetModel.from_urls([other.url], transport="auto") as target,
        ):
            (described,) = target.model_info()["servers"]
            assert described["transport"] == "wire"
            assert "runs in another process" in described["transports_refused"]["inprocess"]
        assert "using transport 'wire'" in caplog.text


def test_an_encoding_that_is_not_offered_is_refused() -> None:
    with (
        loopback_server(lambda: TestRunner(plain_head=False)) as other,
        pytest.raises(ContractError, match=r"in encoding 'hidden': use one of \['probs', 'logits'\]"),
    ):
        RemoteEagle3TargetModel.from_urls([other.url], encoding="hidden")


@pytest.mark.parametrize("limit", [{"max_request_tokens": 20}, {"max_body_bytes": 1300}])
def test_limits_are_checked_before_anything_is_sent(limit: dict[str, int]) -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, **limit) as limited, remote(limited.url) as target:
        rows = {name: torch.ones(2, 30, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}
        message = f"the batch has 60 tokens, {limited.url} takes .*: use a smaller batch, or raise its limits"
        with pytest.raises(RequestTooLarge, match=message):
            target.generate_batch(**rows)
        with pytest.raises(RequestTooLarge):
            target.generate_batch_async(**rows).result(SOON_SECONDS)
        assert runner.forwards == []
        target.generate_batch(**{name: tensor[:1, :10] for name, tensor in rows.items()})


def test_rows_that_break_the_contract_are_refused_before_anything_is_sent(server: HttpServer) -> None:
    rows = rows_of()
    with remote(server.url) as target:
        before = target.model_info()["traffic"]
        for ask in (target.generate_batch, target.generate_batch_async):
            with pytest.raises(ContractError, match="input_ids has 300"):
                ask(**{**rows, "input_ids": rows["input_ids"].clamp(min=300)})
        assert target.model_info()["traffic"] == before


@pytest.mark.parametrize("header", [messages.FINGERPRINT, messages.REQUEST_ID, messages.MAPPING])
@pytest.mark.parametrize("value", ["another", None])
def test_an_answer_to_something_else_is_no_batch(server: HttpServer, header: str, value: str | None) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        if request.path != messages.SUPERVISION:
            return answer
        headers = {name: text for name, text in answer.headers.items() if name.lower() != header.lower()}
        return replace(answer, headers=headers if value is None else {**headers, header: value})

    with forwarding(server.url, change) as liar:
        with remote(liar.url, max_retries=1) as target:
            message = f"answered with {header} {value!r}, expected '.*gave up after 2 attempts"
            with pytest.raises(ProtocolError, match=message):
                target.generate_batch(**rows_of())
            assert target.model_info()["traffic"]["requests"] == 0
        with remote(liar.url, server.url) as target:
            for seed in range(4):
                assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"target_top_ids", b"target_top_iqs", "target_top_iqs .* once too often"),
        (b'"shape":[', b'"shape":[1,', r"not \[|does not fill"),
        (b'"F32"', b'"Q32"', "no valid dtype"),
        (b'{"', b'["', "not JSON"),
    ],
)
def test_an_answer_that_lies_about_itself_is_no_batch(server: HttpServer, old: bytes, new: bytes, message: str) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        if request.path != messages.SUPERVISION:
            return answer
        body = answer.body.replace(old, new, 1)
        if len(body) > len(answer.body):
            body = body.replace(b"  ", b"", 1)
        return with_body(answer, body)

    with (
        forwarding(server.url, change) as liar,
        remote(liar.url, max_retries=0) as target,
        pytest.raises(ProtocolError, match=message),
    ):
        target.generate_batch(**rows_of())


def test_the_mapping_in_both_forms_and_changed_on_the_way(server: HttpServer) -> None:
    rows = rows_of()
    with remote(server.url) as target:
        first, second = mapping_of(1), mapping_of(2, 60)
        target.set_vocab_mapping(first.selected_token_ids, first.selected_token_mask)
        assert_same_batch(target.generate_batch(**rows), expected_batch(rows, mapping=first))
        target.set_vocab_mapping(second)
        assert_same_batch(target.generate_batch(**rows), expected_batch(rows, mapping=second))
        with pytest.raises(VocabMappingError, match="vocabulary of 100"):
            target.set_vocab_mapping(shuffled_mapping(100, 10))
        assert_same_batch(target.generate_batch(**rows), expected_batch(rows, mapping=second))


def test_probs_and_hidden_need_a_mapping(server: HttpServer) -> None:
    for encoding in ("probs", "hidden"):
        with (
            RemoteEagle3TargetModel.from_urls([server.url], encoding=encoding) as target,
            pytest.raises(VocabMappingError, match="call set_vocab_mapping first"),
        ):
            target.generate_batch(**rows_of())


def test_a_server_that_lost_the_mapping_gets_it_again() -> None:
    with (
        loopback_server(TestRunner, max_mappings=1) as forgetful,
        remote(forgetful.url, mapping=mapping_of(1)) as one,
        remote(forgetful.url, mapping=mapping_of(2)) as two,
    ):
        for seed in range(4):
            rows = rows_of(seed)
            assert_same_batch(one.generate_batch(**rows), expected_batch(rows, mapping=mapping_of(1)))
            assert_same_batch(two.generate_batch(**rows), expected_batch(rows, mapping=mapping_of(2)))
        assert one.model_info()["traffic"]["retries"] == 0


def test_a_channel_the_server_forgot_is_opened_again_once() -> None:
    with loopback_server(TestRunner) as forgetful, remote(forgetful.url, transport="inprocess") as target:
        rows = rows_of()
        target.generate_batch(**rows)
        channels = forgetful._channels
        (channel,) = channels._open
        channels.close_channel("inprocess", channel)
        futures = [target.generate_batch_async(**rows) for _ in range(8)]
        for future in futures:
            assert_same_batch(future.result(SOON_SECONDS), expected_batch(rows))
        assert len(channels._open) == 1
    assert channels._open == {}


def test_a_channel_that_could_not_be_opened_again_is_opened_later() -> None:
    with loopback_server(TestRunner, max_channels=1) as forgetful:
        with remote(forgetful.url, transport="inprocess", max_retries=0) as target:
            (channel,) = forgetful._channels._open
            forgetful._channels.close_channel("inprocess", channel)
            taken, _ = forgetful._channels.open("wire", {}, reached_at="127.0.0.1")
            for _ in range(2):
                with pytest.raises(Unavailable, match="1 channels are open, this server holds 1"):
                    target.generate_batch(**rows_of())
            forgetful._channels.close_channel("wire", taken)
            assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert forgetful._channels._open == {}


def test_a_server_restarted_with_another_target_is_refused() -> None:
    with loopback_server(TestRunner) as first:
        port = first.port
        target = RemoteEagle3TargetModel.from_urls([first.url], transport="inprocess", max_retries=0, encoding="logits")
    with (
        target,
        loopback_server(lambda: TestRunner(seed=1), port=port),
        pytest.raises(ProtocolError, match="serves another target than before"),
    ):
        target.generate_batch(**rows_of())


def test_a_mapping_can_be_set_while_a_server_is_down(server: HttpServer) -> None:
    with loopback_server(TestRunner) as second:
        target = RemoteEagle3TargetModel.from_urls([second.url, server.url], transport="wire", encoding="probs")
    with target:
        target.set_vocab_mapping(mapping_of())
        for seed in range(4):
            assert_same_batch(target.generate_batch(**rows_of(seed)), expected_batch(rows_of(seed)))


def test_an_engine_failure_is_told_after_the_retries(server: HttpServer) -> None:
    rows = rows_of()
    rows["input_ids"][0, 0] = POISON
    with remote(server.url, max_retries=1) as target:
        with pytest.raises(AdapterError, match=r"a poisonous token \(gave up after 2 attempts"):
            target.generate_batch(**rows)
        assert target.model_info()["servers"][0]["healthy"] is False
        assert_same_batch(target.generate_batch(**rows_of()), expected_batch(rows_of()))
        assert target.model_info()["servers"][0]["healthy"] is True


def test_prefetch_keeps_the_order_and_its_depth() -> None:
    runner = TestRunner()
    taken: list[int] = []

    def items() -> Iterator[dict[str, torch.Tensor]]:
        for seed in range(10):
            taken.append(seed)
            yield rows_of(seed, batch=1 + seed % 3)

    with loopback_server(lambda: runner) as slow, remote(slow.url) as target:
        runner.gate.clear()
        prefetch = target.prefetch(items(), depth=3)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, prefetch)
            wait_until(lambda: len(taken) == 3 and runner.entered)
            time.sleep(0.05)
            assert len(taken) == 3
            runner.gate.set()
            batches = [first.result(SOON_SECONDS), *prefetch]
    for seed, batch in enumerate(batches):
        assert_same_batch(batch, expected_batch(rows_of(seed, batch=1 + seed % 3)))
    assert len(batches) == 10


def test_prefetch_raises_at_the_turn_of_the_batch_that_failed(server: HttpServer) -> None:
    items = [rows_of(seed) for seed in range(6)]
    items[3]["input_ids"][0, 0] = POISON
    with remote(server.url, max_retries=0) as target:
        prefetch = target.prefetch(items, depth=4)
        for seed in range(3):
            assert_same_batch(next(prefetch), expected_batch(items[seed]))
        with pytest.raises(AdapterError, match="a poisonous token"):
            next(prefetch)
        with pytest.raises(StopIteration):
            next(prefetch)


def test_closing_a_prefetch_cancels_what_is_on_its_way() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner, max_batch_tokens=1) as slow, remote(slow.url) as target:
        runner.gate.clear()
        items = [rows_of(seed) for seed in range(20)]
        with target.prefetch(items, depth=12) as prefetch, ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, prefetch)
            wait_until(lambda: slow.engine.waiting == 3)
            runner.gate.set()
            first.result(SOON_SECONDS)
        assert [*prefetch] == []
        wait_until(lambda: target.model_info()["servers"][0]["outstanding"] == 0)
        assert len(runner.forwards) < 20


def test_a_batch_that_waits_its_turn_can_be_cancelled() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner) as slow, remote(slow.url) as target:
        runner.gate.clear()
        futures = [target.generate_batch_async(**rows_of(seed)) for seed in range(8)]
        assert futures[-1].cancel()
        runner.gate.set()
        for seed, future in enumerate(futures[:-1]):
            assert_same_batch(future.result(SOON_SECONDS), expected_batch(rows_of(seed)))
        with pytest.raises(CancelledError):
            futures[-1].result(SOON_SECONDS)


SERVER_THREADS = tuple(f"eagle-target-{name}" for name in ("http", "engine", "projection", "leases", "shm", "watchdog"))


@pytest.mark.parametrize("transport", ["wire", "inprocess"])
def test_closing_ends_what_is_under_way(transport: str) -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner) as slow, ThreadPoolExecutor(1) as pool:
        with remote(slow.url, transport=transport) as target:
            runner.gate.clear()
            blocked = pool.submit(target.generate_batch, **rows_of())
            wait_until(lambda: runner.entered)
            handles = [target.generate_batch_async(**rows_of()) for _ in range(6)]
            target.close()
            with pytest.raises(ConnectError, match=r"was closed by this client|is closed"):
                blocked.result(SOON_SECONDS)
            for handle in handles:
                assert handle.cancelled() or isinstance(handle.exception(SOON_SECONDS), ConnectError)
            target.close()
        runner.gate.set()
        wait_until(lambda: not slow.engine.waiting)
    wait_until(
        lambda: (
            not any(
                thread.name.startswith("eagle-target")
                for thread in threading.enumerate()
                if thread.name not in SERVER_THREADS
            )
        )
    )


def test_closing_ends_what_is_under_way_over_tls(tmp_path: Path) -> None:
    authority, own = trustme.CA(), tmp_path / "server.pem"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(own))
    runner = TestRunner()
    with (
        loopback_server(lambda: runner, tls_cert=own, tls_key=own) as slow,
        remote(slow.url, ca_file=tmp_path / "ca.pem") as target,
    ):
        runner.gate.clear()
        blocked = target.generate_batch_async(**rows_of())
        wait_until(lambda: runner.entered)
        target.close()
        with pytest.raises(ConnectError, match="was closed by this client"):
            blocked.result(SOON_SECONDS)
        runner.gate.set()
        wait_until(lambda: not slow.engine.waiting)


def test_a_closed_client_says_so(server: HttpServer) -> None:
    with remote(server.url) as target:
        pass
    calls = (
        lambda: target.generate_batch(**rows_of()),
        lambda: target.generate_batch_async(**rows_of()),
        lambda: target.set_vocab_mapping(mapping_of()),
        target.input_embedding_weight,
        lambda: next(target.prefetch([rows_of()])),
    )
    for call in calls:
        with pytest.raises(ConnectError, match="closed"):
            call()
    target.model_info()


def test_a_server_that_does_not_answer_in_time_is_an_error() -> None:
    runner = TestRunner()
    with loopback_server(lambda: runner) as slow, remote(slow.url, timeout=0.3, max_retries=1) as target:
        runner.gate.clear()
        with pytest.raises(TransferTimeout, match=r"did not answer within 0.3 s.*gave up after 2 attempts"):
            target.generate_batch(**rows_of())
        runner.gate.set()
        wait_until(lambda: not slow.engine.waiting)


@pytest.mark.parametrize("urls", [True, False])
def test_targets_open_from_settings(
    server: HttpServer, urls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mapping.safetensors"
    mapping_of(3).save(path)
    where: dict[str, Any] = {"urls": (server.url,)} if urls else {"model": "any"}
    monkeypatch.setattr("eagle_target.targets.load_runner", lambda *_: EmbeddingRunner())
    config = ClientConfig(**where, vocab_mapping=path, encoding="hidden", probs_dtype="bfloat16", rows="all")
    with open_target(config) as target:
        assert isinstance(target, RemoteEagle3TargetModel if urls else RunnerEagle3TargetModel)
        rows = rows_of()
        expected = expected_batch(
            rows, mapping=mapping_of(3), encoding="hidden", probs_dtype=torch.bfloat16, rows="all"
        )
        assert_same_batch(target.generate_batch(**rows), expected)


def test_settings_that_name_no_target_or_a_wrong_mapping(server: HttpServer, tmp_path: Path) -> None:
    wheres: tuple[dict[str, Any], ...] = ({}, {"urls": (server.url,), "model": "x"})
    for where in wheres:
        with pytest.raises(ConfigError, match="either urls of servers or a model"):
            open_target(ClientConfig(**where))
    with pytest.raises(ConfigError, match="has transport 'inprocess', got 'wire'"):
        open_target(ClientConfig(model="x", transport="wire"))
    path = tmp_path / "mapping.safetensors"
    shuffled_mapping(100, 10).save(path)
    with pytest.raises(VocabMappingError, match="vocabulary of 100"):
        open_target(ClientConfig(urls=(server.url,), vocab_mapping=path))


def test_a_refused_mapping_is_an_error(server: HttpServer) -> None:
    def change(request: Received, answer: Answer) -> Answer:
        return replace(answer, status=418) if request.method == "PUT" else answer

    with (
        forwarding(server.url, change) as other,
        RemoteEagle3TargetModel.from_urls([other.url]) as target,
        pytest.raises(ServerError, match="no body"),
    ):
        target.set_vocab_mapping(mapping_of())
