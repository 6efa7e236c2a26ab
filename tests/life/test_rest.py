"""What a server without work gives back."""

from __future__ import annotations

import platform

import pytest
import torch

from eagle_target.contract.request import SupervisionRequest
from eagle_target.protocol import messages
from tests.faults.processes import LARGE, faulty_server
from tests.server.cases import wait_until
from tests.server.http import ask, body_of

TOKENS = 512
# One answer's logits. A server that works keeps that much, and the heaps of the threads that made it.
ANSWER_BYTES = TOKENS * LARGE["vocab_size"] * 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_a_server_at_rest_keeps_no_memory_of_its_answers() -> None:
    ids = torch.ones(TOKENS, dtype=torch.int64)
    request = SupervisionRequest(input_ids=ids, seq_lens=(TOKENS,), row_mask=ids.bool(), encoding="logits")
    with faulty_server(LARGE) as server:
        for _ in range(10):
            assert len(ask(server.url, "POST", messages.SUPERVISION, body_of(request)).body) > ANSWER_BYTES
        working = server.rss()
        # More than the one answer kept for the next, which lies outside of any heap.
        wait_until(lambda: server.rss() < working - ANSWER_BYTES * 3 // 2, "the system's having its memory back")
