"""One request and its answer over the wire, byte for byte: both ends may be rewritten, what they say may not change."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import torch

from eagle_target import RemoteEagle3TargetModel
from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
from eagle_target.contract.target import TargetInfo
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.testing.server import loopback_server
from tests.client.stub import forwarding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from tests.client.stub import Received
    from tests.server.http import Answer

VOCAB_SIZE, HIDDEN_SIZE = 11, 2
CERTAIN = 1000.0
MAPPING = "f05ccd13bc6397191ea59d39d449072c219f0c36a02cda2c1f72473cfa21d6f6"
REQUEST_ID = "a5a5a5a5a5a5a5a5"

REQUEST_HEADERS = {
    "content-length": "423",
    "content-type": "application/vnd.safetensors",
    "eagle-target-checksum": "xxh3_64=bef1b2fcf5a0d706",
    "eagle-target-request-id": REQUEST_ID,
    "eagle-target-transport": "wire",
    "eagle-target-want-checksum": "xxh3_64",
}
REQUEST_HEADER = (
    '{"__metadata__":{"encoding":"probs","probs_dtype":"float32","vocab_mapping":"' + MAPPING + '"},'
    '"input_ids":{"dtype":"I64","shape":[7],"data_offsets":[0,56]},'
    '"seq_lens":{"dtype":"I64","shape":[2],"data_offsets":[56,72]},'
    '"row_mask":{"dtype":"BOOL","shape":[7],"data_offsets":[72,79]}}     '
)
REQUEST_TENSORS = (
    "0300000000000000 0100000000000000 0400000000000000 0100000000000000"  # input_ids
    "0500000000000000 0900000000000000 0200000000000000"
    "0400000000000000 0300000000000000"  # seq_lens
    "00010101 000101"  # row_mask
)

ANSWER_HEADERS = {
    "content-length": "756",
    "content-type": "application/vnd.safetensors",
    "eagle-target-answered": "ef89d74f468801ee7a1aad4ad701e579",
    "eagle-target-checksum": "xxh3_64=3243e83f086c10f2",
    "eagle-target-fingerprint": "a1c8cb9b177ba999",
    "eagle-target-mapping": MAPPING,
    "eagle-target-request-id": REQUEST_ID,
}
ANSWER_HEADER = (
    '{"__metadata__":{"Eagle-Target-Request-Id":"' + REQUEST_ID + '",'
    '"Eagle-Target-Answered":"ef89d74f468801ee7a1aad4ad701e579","Eagle-Target-Fingerprint":"a1c8cb9b177ba999",'
    '"Eagle-Target-Mapping":"' + MAPPING + '"},'
    '"target_logsumexp":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},'
    '"target_probs":{"dtype":"F32","shape":[5,4],"data_offsets":[20,100]},'
    '"target_top_ids":{"dtype":"I32","shape":[5],"data_offsets":[100,120]},'
    '"aux_hidden_states":{"dtype":"BF16","shape":[7,6],"data_offsets":[120,204]}}  '
)
ANSWER_TENSORS = (
    "00007a44 00007a44 00007a44 00007a44 00007a44"  # target_logsumexp
    "0000803e 0000803e 0000803e 0000803e"  # target_probs
    "0000803e 0000803e 0000803e 0000803e"
    "00000000 00000000 0000803f 00000000"
    "00000000 00000000 00000000 0000803f"
    "00000000 00000000 0000803f 00000000"
    "02000000 06000000 04000000 0a000000 04000000"  # target_top_ids
    "8040803f c0404040 e0408040"  # aux_hidden_states
    "00400040 80408040 a040a040"
    "a0404040 e040a040 0041c040"
    "00408040 8040c040 a040e040"
    "c040803f 00414040 10418040"
    "20410040 40418040 5041a040"
    "40404040 a040a040 c040c040"
)


class ExactRunner(TargetRunner):
    """Every value is a small whole number, and every probability 1, 1/4 or 0: the same bits on any machine."""

    @property
    def info(self) -> TargetInfo:
        return TargetInfo(
            model="exact",
            num_layers=8,
            hidden_size=HIDDEN_SIZE,
            vocab_size=VOCAB_SIZE,
            dtype="bfloat16",
            device="cpu",
            engine="exact",
            engine_version="1",
        )

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        self._layers = tuple(aux_layer_ids)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        places = torch.cat([torch.arange(length) for length in seq_lens])
        hidden = torch.stack([input_ids, places], dim=1).to(torch.bfloat16)
        aux = torch.cat([hidden + layer for layer in self._layers], dim=1)
        return TargetForward(aux_hidden_states=aux, last_hidden_states=hidden)

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        best = last_hidden_states.long().sum(dim=1) % VOCAB_SIZE
        return torch.nn.functional.one_hot(best, VOCAB_SIZE).to(torch.bfloat16) * CERTAIN

    def input_embedding_weight(self) -> torch.Tensor:
        return torch.zeros(VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.bfloat16)

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        return None

    def close(self) -> None:
        return


def body(header: str, tensors: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + bytes.fromhex(tensors)


def among(headers: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, str]:
    given = {name.lower(): value for name, value in headers.items()}
    return {name: given.get(name, "") for name in expected}


def test_a_request_and_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Received] = []
    answered: list[Answer] = []

    def look(request: Received, answer: Answer) -> Answer:
        if request.path == "/v1/supervision":
            asked.append(request)
            answered.append(answer)
        return answer

    monkeypatch.setattr(secrets, "token_hex", lambda nbytes=32: REQUEST_ID[: 2 * nbytes])
    input_ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with (
        loopback_server(ExactRunner, aux_layer_ids=(1, 3, 4)) as server,
        forwarding(server.url, look) as between,
        RemoteEagle3TargetModel.from_urls([between.url], transport="wire", encoding="probs") as target,
    ):
        target.set_vocab_mapping(VocabMapping.from_ids(torch.tensor([7, 1, 4, 10]), VOCAB_SIZE))
        target.generate_batch(input_ids, attention_mask, attention_mask)
    (request,), (answer,) = asked, answered
    assert request.method == "POST"
    assert request.body == body(REQUEST_HEADER, REQUEST_TENSORS)
    assert among(request.headers, REQUEST_HEADERS) == REQUEST_HEADERS
    assert answer.status == 200
    assert answer.body == body(ANSWER_HEADER, ANSWER_TENSORS)
    assert among(answer.headers, ANSWER_HEADERS) == ANSWER_HEADERS
