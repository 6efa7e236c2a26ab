"""Requests and mappings as bytes: the same over HTTP, to vLLM's workers and to SGLang's ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import VocabMappingError
from eagle_target.protocol.messages import decode_mapping, decode_request, encode_mapping, encode_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.contract.request import Encoding

MAPPING = VocabMapping.from_ids(torch.tensor([4, 0, 2]), 5)
REQUEST = SupervisionRequest(
    input_ids=torch.tensor([3, 1, 4, 1, 0]),
    seq_lens=(3, 2),
    row_mask=torch.tensor([False, True, True, False, True]),
    encoding="probs",
    mapping=MAPPING,
    probs_dtype=torch.bfloat16,
)
# By hand, from docs/protocol.md and the format of safetensors.
HEADER = (
    b'{"__metadata__":{"encoding":"probs","probs_dtype":"bfloat16","vocab_mapping":"'
    + MAPPING.sha256.encode()
    + b'"},"input_ids":{"dtype":"I64","shape":[5],"data_offsets":[0,40]},'
    b'"seq_lens":{"dtype":"I64","shape":[2],"data_offsets":[40,56]},'
    b'"row_mask":{"dtype":"BOOL","shape":[5],"data_offsets":[56,61]}}'
)
VALUES = (3, 1, 4, 1, 0, 3, 2)


def body_of(request: SupervisionRequest) -> memoryview:
    return memoryview(bytearray(b"".join(encode_request(request))))


def known(*mappings: VocabMapping) -> Callable[[str], VocabMapping]:
    return {mapping.sha256: mapping for mapping in mappings}.__getitem__


def test_a_request_has_these_bytes() -> None:
    padded = HEADER + b" " * (-len(HEADER) % 8)
    ids_and_lengths = b"".join(value.to_bytes(8, "little") for value in VALUES)
    assert bytes(body_of(REQUEST)) == (
        len(padded).to_bytes(8, "little") + padded + ids_and_lengths + bytes([0, 1, 1, 0, 1])
    )


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
@pytest.mark.parametrize("mapping", [None, MAPPING], ids=["bare", "mapped"])
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_request_comes_back_as_it_was(
    encoding: Encoding, mapping: VocabMapping | None, probs_dtype: torch.dtype
) -> None:
    sent = replace(REQUEST, encoding=encoding, mapping=mapping, probs_dtype=probs_dtype)
    read = decode_request(body_of(sent), known(MAPPING))
    assert torch.equal(read.input_ids, sent.input_ids)
    assert torch.equal(read.row_mask, sent.row_mask)
    assert (read.seq_lens, read.encoding, read.mapping, read.probs_dtype) == ((3, 2), encoding, mapping, probs_dtype)


def test_a_request_is_read_without_a_copy() -> None:
    body = body_of(REQUEST)
    read = decode_request(body, known(MAPPING))
    body[len(body) - 5] = 1
    assert read.row_mask.tolist() == [True, True, True, False, True]


def test_a_mapping_comes_back_as_it_was_in_memory_of_its_own() -> None:
    body = bytearray(b"".join(encode_mapping(MAPPING)))
    read = decode_mapping(memoryview(body))
    body[:] = bytes(len(body))
    assert read == MAPPING
    assert read.vocab_size == 5


def test_a_mapping_that_is_not_there_is_the_readers_error() -> None:
    def refuse(sha256: str) -> VocabMapping:
        raise VocabMappingError(f"no {sha256}")

    with pytest.raises(VocabMappingError, match=MAPPING.sha256):
        decode_request(body_of(REQUEST), refuse)
