"""Sequences that are asked for again come from the cache, whatever they come with; it is bounded and off by default."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner
from tests.server.cases import TestRunner, assert_same_tensors, engine, expected_of, held, mapping_of, request_of
from tests.server.http import ask, body_of, put_mapping

if TYPE_CHECKING:
    from eagle_target.contract.request import SupervisionRequest

LARGE = 1 << 30


def joined(*requests: SupervisionRequest) -> SupervisionRequest:
    """One request with the sequences of several."""
    return replace(
        requests[0],
        input_ids=torch.cat([request.input_ids for request in requests]),
        seq_lens=tuple(length for request in requests for length in request.seq_lens),
        row_mask=torch.cat([request.row_mask for request in requests]),
    )


def whole_vocabulary(request: SupervisionRequest) -> VocabMapping:
    """For a trainer that projects it by itself."""
    assert request.mapping is not None
    return VocabMapping.identity(request.mapping.vocab_size)


A, B, C = request_of([7], seed=1), request_of([4], seed=2), request_of([9], seed=3)


def test_a_sequence_is_computed_once_whatever_it_comes_with() -> None:
    runner = TestRunner()
    asked = [joined(A, B), joined(C, A), joined(B, C, B), joined(A, B)]
    with engine(lambda: runner, cache_bytes=LARGE) as server:
        for request in asked:
            assert_same_tensors(server.submit(request).result(30).tensors, expected_of(request))
        assert server.cache is not None
        assert (server.cache.hits, server.cache.misses) == (6, 3)
    assert runner.forwards == [(7, 4), (9,)]


def test_other_values_are_computed() -> None:
    request = joined(A, B)
    others = [
        replace(request, encoding="hidden"),
        replace(request, encoding="hidden", mapping=whole_vocabulary(request)),
        replace(request, mapping=mapping_of(5)),
        replace(request, probs_dtype=torch.bfloat16),
        replace(request, row_mask=~request.row_mask),
        replace(request, input_ids=request.input_ids.flip(0)),
    ]
    runner = TestRunner()
    with engine(lambda: runner, cache_bytes=LARGE) as server:
        for asked in (request, *others):
            assert_same_tensors(server.submit(asked).result(30).tensors, expected_of(asked))
    assert len(runner.forwards) == 7


def test_the_mapping_matters_only_where_it_decides_values() -> None:
    request = replace(A, encoding="hidden")
    runner = TestRunner()
    with engine(lambda: runner, cache_bytes=LARGE) as server:
        for mapping in (None, mapping_of(1), mapping_of(2)):
            server.submit(replace(request, mapping=mapping)).result(30)
    assert runner.forwards == [(7,)]


@pytest.mark.parametrize("concurrent_head", [False, True])
def test_parts_hits_and_others_share_a_forward(concurrent_head: bool) -> None:
    runner = TestRunner(concurrent_head=concurrent_head)
    large = joined(A, request_of([6], seed=7), B, request_of([5], seed=8))
    with engine(lambda: runner, cache_bytes=LARGE, max_batch_tokens=12) as server:
        for request in (A, B):
            server.submit(request).result(30)
        with held(server, runner):
            futures = [server.submit(request, client=client) for request, client in ((large, "a"), (B, "b"), (C, "b"))]
        for request, future in zip((large, B, C), futures, strict=True):
            assert_same_tensors(future.result(30).tensors, expected_of(request))
    assert sorted(length for lengths in runner.forwards for length in lengths) == [3, 4, 5, 6, 7, 9]


def test_the_cache_is_bounded_and_the_least_used_goes_first() -> None:
    runner = TestRunner()
    size = sum(tensor.nbytes for tensor in expected_of(C).values())
    requests = [replace(C, input_ids=C.input_ids.roll(shift)) for shift in range(3)]
    with engine(lambda: runner, cache_bytes=2 * size) as server:
        for number in (0, 1, 0, 2, 0, 1):
            server.submit(requests[number]).result(30)
            assert server.cache is not None
            assert server.cache.held_bytes <= 2 * size
    assert len(runner.forwards) == 4


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    runner = TestRunner()
    with engine(lambda: runner, cache_bytes=100) as server:
        for _ in range(2):
            assert_same_tensors(server.submit(C).result(30).tensors, expected_of(C))
        assert server.cache is not None
        assert server.cache.held_bytes == 0
    assert len(runner.forwards) == 2


def test_a_failed_sequence_is_not_kept() -> None:
    runner = TestRunner()
    poisonous = request_of([4], poisonous=True)
    with engine(lambda: runner, cache_bytes=LARGE) as server:
        for _ in range(2):
            assert server.submit(poisonous).exception(30) is not None
        assert server.cache is not None
        assert server.cache.hits == 0


def test_there_is_none_unless_it_is_asked_for() -> None:
    runner = TestRunner()
    with engine(lambda: runner) as server:
        for _ in range(2):
            server.submit(A).result(30)
        assert server.cache is None
    assert len(runner.forwards) == 2


def test_over_http_with_metrics() -> None:
    with loopback_server(EmbeddingRunner, cache_bytes=LARGE) as server:
        put_mapping(server.url, mapping_of())
        answers = [ask(server.url, "POST", "/v1/supervision", body_of(joined(A, B))) for _ in range(2)]
        for answer in answers:
            assert_same_tensors(answer.tensors()[0], expected_of(joined(A, B)))
        text = ask(server.url, "GET", "/metrics").body.decode()
        assert "eagle_target_cache_hit_sequences_total 2.0" in text
        assert "eagle_target_cache_missed_sequences_total 2.0" in text
        assert "eagle_target_cache_bytes 0" not in text
