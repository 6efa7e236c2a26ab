"""The HTTP protocol, as both ends spell it. See docs/protocol.md."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy
import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle_target.contract.request import PROBS_DTYPES, SupervisionRequest
from eagle_target.contract.target import ServedTarget, TargetInfo
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import ContractError, ProtocolError
from eagle_target.protocol.tensors import decode_tensors, encode_tensors, tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PROTOCOL_VERSION = 1
CONTENT_TYPE = "application/vnd.safetensors"

REQUEST_ID = "Eagle-Target-Request-Id"
TRANSPORT = "Eagle-Target-Transport"
CHANNEL = "Eagle-Target-Channel"
CLIENT = "Eagle-Target-Client"
FINGERPRINT = "Eagle-Target-Fingerprint"
MAPPING = "Eagle-Target-Mapping"
MOVED_BYTES = "Eagle-Target-Moved-Bytes"
CHECKSUM = "Eagle-Target-Checksum"
WANT_CHECKSUM = "Eagle-Target-Want-Checksum"
ANSWERED = "Eagle-Target-Answered"
PASSED_OVER = "Eagle-Target-Passed-Over"
TIMINGS = "Server-Timing"

HEALTH = "/health"
READY = "/ready"
METRICS = "/metrics"
STATUS = "/"
TARGET = "/v1/target"
INPUT_EMBEDDINGS = "/v1/target/input_embeddings"
LM_HEAD = "/v1/target/lm_head"
VOCAB_MAPPINGS = "/v1/vocab-mappings"
SUPERVISION = "/v1/supervision"
TRANSPORTS = "/v1/transports"
CLIENTS = "/v1/clients"

# The only checksum there is: what a request asks for, and the start of what a message says of its body.
CHECKSUM_NAME = "xxh3_64"

# Of a count in a header: what is longer is no count, and python takes long to read it.
MAX_COUNT_DIGITS = 20

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in PROBS_DTYPES}


class Limits(BaseModel):
    """What one request may have, as the handshake tells."""

    model_config = ConfigDict(frozen=True)

    max_body_bytes: int
    max_request_tokens: int
    max_batch_tokens: int
    max_queue: int


class Handshake(BaseModel):
    """What `GET /v1/target` answers."""

    model_config = ConfigDict(frozen=True)

    protocol: int = PROTOCOL_VERSION
    server_version: str
    target: TargetInfo
    aux_layer_ids: tuple[int, int, int]
    fingerprint: str
    encodings: tuple[str, ...]
    bytes_per_token: dict[str, int] = Field(default={}, description="Of a token that bears loss, by encoding.")
    transports: dict[str, dict[str, Any]] = Field(description="Each offered transport's offer, by name.")
    limits: Limits

    @property
    def served(self) -> ServedTarget:
        """The target and its layers."""
        return ServedTarget(info=self.target, aux_layer_ids=self.aux_layer_ids)


def read_handshake(body: bytes) -> Handshake:
    """Read a server's handshake.

    Raises:
        ProtocolError: not a handshake, or of another protocol version.
    """
    try:
        handshake = Handshake.model_validate_json(body)
    except ValidationError as error:
        raise ProtocolError(f"the server's answer is no handshake: {error.errors()[0]['msg']}") from error
    if handshake.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the server speaks protocol {handshake.protocol} (eagle-target {handshake.server_version}), this client "
            f"{PROTOCOL_VERSION}: install the same version on both sides"
        )
    return handshake


def read_json_object(body: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ProtocolError: it is none.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is not a JSON object")
    return value


def read_count(text: str) -> int | None:
    """A number of bytes or seconds in a header; None where there is none that a peer could mean."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_COUNT_DIGITS else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def checksum_of(parts: Iterable[bytes | bytearray | memoryview]) -> str:
    """What a message says of its body: the checksum's name, and its value in hexadecimal."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return f"{CHECKSUM_NAME}={state.hexdigest()}"


def request_digest(request: SupervisionRequest) -> str:
    """XXH3 (128 bits, hexadecimal) of all that decides a request's answer, as docs/protocol.md spells it.

    The client computes it of what it asked for, the server of what it answered. It finds what chance changed; TLS
    keeps out who changes it on purpose.
    """
    sha256 = "" if request.mapping is None else request.mapping.sha256
    probs_dtype = str(request.probs_dtype).removeprefix("torch.")
    facts = [request.encoding, probs_dtype, sha256, len(request.seq_lens), request.tokens]
    state = xxhash.xxh3_128(json.dumps(facts, separators=(",", ":")).encode())
    state.update(numpy.array(request.seq_lens, numpy.int64).data)
    state.update(tensor_bytes(request.input_ids))
    state.update(tensor_bytes(request.row_mask))
    return state.hexdigest()


def head_digest(token_ids: torch.Tensor) -> str:
    """XXH3 (128 bits, hexadecimal) of the int64 ids whose rows of the LM head are asked for."""
    return xxhash.xxh3_128(tensor_bytes(token_ids)).hexdigest()


def encode_request(request: SupervisionRequest) -> list[memoryview]:
    """A supervision request as a safetensors body in parts: over HTTP, and to the processes of an engine."""
    tensors = {
        "input_ids": request.input_ids,
        "seq_lens": torch.tensor(request.seq_lens, dtype=torch.int64),
        "row_mask": request.row_mask,
    }
    metadata = {"encoding": request.encoding, "probs_dtype": str(request.probs_dtype).removeprefix("torch.")}
    if request.mapping is not None:
        metadata["vocab_mapping"] = request.mapping.sha256
    return encode_tensors(tensors, metadata)


def decode_request(body: memoryview, find_mapping: Callable[[str], VocabMapping]) -> SupervisionRequest:
    """Read a supervision request; `row_mask` may be left out for all rows but each sequence's first.

    The tensors are views of the body. Whoever takes it from outside goes on with `SupervisionRequest.check`.

    Raises:
        ProtocolError: the body is not safetensors.
        ContractError: a tensor is missing or of the wrong dtype, or the metadata is not known.
        VocabMappingError: from `find_mapping`.
    """
    tensors, metadata = decode_tensors(body)
    for name in ("input_ids", "seq_lens"):
        if name not in tensors or tensors[name].dtype != torch.int64 or tensors[name].dim() != 1:
            raise ContractError(f"the request needs {name} as an int64 vector, got {_describe(tensors.get(name))}")
    unknown = {*tensors} - {"input_ids", "seq_lens", "row_mask"}
    if unknown:
        raise ContractError(
            f"the request has unknown tensors {sorted(unknown)}: known are input_ids, seq_lens, row_mask"
        )
    seq_lens = tuple(tensors["seq_lens"].tolist())
    probs_dtype = metadata.get("probs_dtype", "float32")
    if probs_dtype not in DTYPE_NAMES:
        raise ContractError(f"probs_dtype must be one of {sorted(DTYPE_NAMES)}, got {probs_dtype!r}")
    sha256 = metadata.get("vocab_mapping")
    row_mask = tensors.get("row_mask")
    return SupervisionRequest(
        input_ids=tensors["input_ids"],
        seq_lens=seq_lens,
        row_mask=_all_but_first(seq_lens, len(tensors["input_ids"])) if row_mask is None else row_mask,
        encoding=metadata.get("encoding", "probs"),  # type: ignore[arg-type]
        mapping=None if sha256 is None else find_mapping(sha256),
        probs_dtype=DTYPE_NAMES[probs_dtype],
    )


def encode_mapping(mapping: VocabMapping) -> list[memoryview]:
    """A vocabulary mapping as a safetensors body in parts."""
    return encode_tensors(
        {"selected_token_ids": mapping.selected_token_ids, "selected_token_mask": mapping.selected_token_mask}, {}
    )


def decode_mapping(body: memoryview) -> VocabMapping:
    """Read a vocabulary mapping; the body may be thrown away afterwards.

    Raises:
        ProtocolError: the body is not safetensors. VocabMappingError: the mapping is not valid.
    """
    tensors, _ = decode_tensors(body)
    if {*tensors} != {"selected_token_ids", "selected_token_mask"}:
        raise ContractError(f"a mapping has selected_token_ids and selected_token_mask, got {sorted(tensors)}")
    return VocabMapping(tensors["selected_token_ids"].clone(), tensors["selected_token_mask"].clone())


def _all_but_first(seq_lens: tuple[int, ...], tokens: int) -> torch.Tensor:
    row_mask = torch.ones(tokens, dtype=torch.bool)
    start = 0
    for length in seq_lens:
        if 0 <= start < tokens:
            row_mask[start] = False
        start += length
    return row_mask


def _describe(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
