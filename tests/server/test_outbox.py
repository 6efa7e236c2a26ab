"""Room for answers is bounded for a client and in all, and comes back when the answer is gone."""

from __future__ import annotations

import pytest
import torch

from eagle_target.contract.request import answer_bytes, aux_bytes, row_bytes
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import RequestTooLarge
from eagle_target.server.engine.outbox import Outbox, follow
from eagle_target.testing.tiny import EmbeddingRunner
from tests.server.cases import expected_of, request_of


def test_room_is_bounded_for_a_client_and_in_all() -> None:
    outbox = Outbox(max_bytes=100, max_client_bytes=60)
    first = outbox.claim("a", 60)
    assert first is not None
    assert outbox.claim("a", 1) is None
    second = outbox.claim("b", 40)
    assert second is not None
    assert outbox.claim("c", 1) is None
    assert (outbox.held_bytes, outbox.peak_bytes) == (100, 100)
    del first
    assert outbox.held_bytes == 40
    again = outbox.claim("a", 50)
    assert again is not None
    assert (outbox.held_bytes, outbox.peak_bytes) == (90, 100)


def test_a_claim_lasts_as_long_as_what_it_follows() -> None:
    outbox = Outbox(100, 100)
    told: list[int] = []
    outbox.watch(lambda: told.append(1))
    claim = outbox.claim("a", 70)
    assert claim is not None
    first, second = PackedTensors(), PackedTensors()
    follow(claim, first)
    follow(claim, second)
    del claim, first
    assert (outbox.held_bytes, told) == (70, [])
    del second
    assert (outbox.held_bytes, told) == (0, [1])


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    Outbox(100, 60).check(60)
    with pytest.raises(
        RequestTooLarge, match=r"takes 61 bytes, .* keeps 60 .* raise max_client_outbox_bytes"
    ) as caught:
        Outbox(100, 60).check(61)
    assert (caught.value.status, caught.value.problem) == (413, "answer-too-large")
    with pytest.raises(RequestTooLarge, match=r"keeps 50 .* raise max_outbox_bytes"):
        Outbox(50, 60).check(61)


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_the_bytes_of_an_answer_are_known_before_it_is_made(encoding: str) -> None:
    request = request_of([9, 1, 30], encoding=encoding)  # type: ignore[arg-type]
    expected = sum(tensor.nbytes for tensor in expected_of(request).values())
    assert answer_bytes(request, EmbeddingRunner().info) == expected


def test_bytes_of_a_known_model() -> None:
    info = EmbeddingRunner().info.model_copy(update={"hidden_size": 4096, "vocab_size": 128256, "dtype": "bfloat16"})
    assert aux_bytes(info) == 24_576
    assert row_bytes(info, "probs", draft_vocab_size=32_000) == 128_000 + 8
    assert row_bytes(info, "probs", draft_vocab_size=32_000, probs_dtype=torch.bfloat16) == 64_000 + 8
    assert row_bytes(info, "hidden", draft_vocab_size=32_000) == 8_192 + 8
    assert row_bytes(info, "hidden", draft_vocab_size=128_256) == 8_192
    assert row_bytes(info, "logits", draft_vocab_size=0) == 4 * 128_256 + 8
