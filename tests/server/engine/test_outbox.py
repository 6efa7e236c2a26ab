"""Room for answers is bounded for a client and in all, and comes back when the answer is gone."""

from __future__ import annotations

import threading

import pytest
import torch

from eagle_target.contract.request import answer_bytes, aux_bytes, row_bytes
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import RequestTooLarge
from eagle_target.server.engine.answer import Answer, HostMemory
from eagle_target.server.engine.outbox import Outbox
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
    first.release()
    first.release()
    assert outbox.held_bytes == 40
    again = outbox.claim("a", 50)
    assert again is not None
    assert (outbox.held_bytes, outbox.peak_bytes) == (90, 100)


def test_an_answer_that_is_released_has_its_room_until_nobody_holds_its_tensors() -> None:
    outbox = Outbox(100, 100)
    held = PackedTensors()
    answers = [Answer(request_of([4]), tensors, HostMemory(torch.device("cpu"))) for tensors in (held, PackedTensors())]
    for answer, nbytes in zip(answers, (70, 30), strict=True):
        answer.hand_over(outbox.claim("a", nbytes), {})
    assert outbox.held_bytes == 100
    for answer in answers:
        answer.release()
        answer.release()
    # What a transport keeps for its client.
    assert outbox.held_bytes == 70
    del held
    assert outbox.held_bytes == 0


def test_whoever_waits_for_room_is_woken() -> None:
    outbox = Outbox(100, 100)
    claim = outbox.claim("a", 70)
    assert claim is not None
    with outbox.changed:
        threading.Timer(0.0, claim.release).start()
        assert outbox.changed.wait(30)
    assert outbox.claim("a", 100) is not None


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
