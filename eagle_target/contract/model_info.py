"""What `model_info()` tells, of a target in this process and of one on servers: plain JSON data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.target import TargetInfo


class ServerState(TypedDict):
    """One server, as a client knows it.

    transports_refused: why each better transport is not used, by name. fallbacks: times that a transport broke and
    another was taken. failures: in a row. paused_seconds: until it is tried again. outstanding: requests under way.
    """

    url: str
    transport: str
    transports_refused: dict[str, str]
    fallbacks: int
    healthy: bool
    failures: int
    paused_seconds: float
    outstanding: int
    last_error: str | None


class TrafficTotals(TypedDict):
    """Sums over the requests of one client. seconds: by stage. retries: attempts that were made again."""

    requests: int
    tokens: int
    bytes_received: int
    seconds: dict[str, float]
    retries: int


class ModelInfo(TypedDict):
    """Facts about a target and how it is reached.

    The first are those of `TargetInfo`. transport: of a target in this process. servers, traffic, bytes_per_token: of
    one on servers; the bytes are those of a token that bears loss, by encoding.
    """

    model: str
    revision: str | None
    weights: str | None
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    device: str
    engine: str
    engine_version: str
    max_seq_len: int | None
    aux_layer_ids: list[int]
    fingerprint: str
    encoding: str
    transport: NotRequired[str]
    bytes_per_token: NotRequired[dict[str, int]]
    servers: NotRequired[list[ServerState]]
    traffic: NotRequired[TrafficTotals]


def describe_target(info: TargetInfo, aux_layer_ids: Sequence[int], fingerprint: str, encoding: str) -> ModelInfo:
    """The facts that every target has."""
    facts = {
        **info.model_dump(mode="json"),
        "aux_layer_ids": list(aux_layer_ids),
        "fingerprint": fingerprint,
        "encoding": encoding,
    }
    return cast("ModelInfo", facts)
