"""The suite of transports finds the mistakes it is there to find, and its harness is sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_wire.transport import WireClientChannel, WireServerChannel, WireServerEndpoint, WireTransport

from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ConnectError
from eagle_target.plugins.transport import Reply
from eagle_target.testing.transport_harness import ChannelPair, MemoryBody, random_tensor, scattered_positions
from eagle_target.testing.transports import TransportConformance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.contract.sinks import Sink
    from eagle_target.plugins.transport import IncomingBody, ServerChannel


class Suite(TransportConformance):
    transport = WireTransport


class FlipsABit(WireServerChannel):
    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        reply = super().send(transfer_id, tensors, metadata)
        last = bytearray(reply.parts[-1])
        last[-1] ^= 1
        return Reply(reply.content_type, [*reply.parts[:-1], memoryview(last)])


class Widens(WireServerChannel):
    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        return super().send(transfer_id, {name: tensor.float() for name, tensor in tensors.items()}, metadata)


class ForgetsMetadata(WireServerChannel):
    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        return super().send(transfer_id, tensors, {})


class DropsEmpty(WireServerChannel):
    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        return super().send(transfer_id, {name: each for name, each in tensors.items() if each.numel()}, metadata)


class SendsOneAtATime(WireServerChannel):
    reply: Reply | None = None

    def send(self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Reply:
        if self.reply is None:
            self.reply = super().send(transfer_id, tensors, metadata)
        return self.reply


class Overruns(WireClientChannel):
    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        return super().receive(body, Spilling(sink))


class Spilling:
    """Writes into the row after the last one of a scattering store."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink

    def allocate(self, name: str, shape: Any, dtype: torch.dtype) -> Any:
        store = self._sink.allocate(name, shape, dtype)
        store.out[-1:] = 1
        return store

    def put(self, name: str, rows: torch.Tensor) -> None:
        self._sink.put(name, rows)


MISTAKES: dict[str, tuple[Any, Any]] = {
    "test_nothing_but_empty_tensors": (DropsEmpty, WireClientChannel),
    "test_metadata": (ForgetsMetadata, WireClientChannel),
    "test_all_dtypes_at_once": (Widens, WireClientChannel),
    "test_views_of_one_memory": (FlipsABit, WireClientChannel),
    "test_transfers_are_received_in_any_order": (SendsOneAtATime, WireClientChannel),
    "test_a_sink_may_scatter": (WireServerChannel, Overruns),
}


def joined(server: Any, client: Any) -> ChannelPair:
    class Endpoint(WireServerEndpoint):
        def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:
            return server(), {}

    pair = ChannelPair(WireTransport, Endpoint(), {})
    pair.client = client()
    return pair


@pytest.mark.parametrize("test", MISTAKES)
def test_a_good_channel_passes_and_a_mistake_is_found(test: str) -> None:
    check = getattr(Suite(), test)
    check(joined(WireServerChannel, WireClientChannel))

    with pytest.raises(AssertionError):
        check(joined(*MISTAKES[test]))


def test_a_memory_body_ends_like_a_broken_connection() -> None:
    body = MemoryBody("text/plain", b"abcdef", length=10)
    buffer = bytearray(4)
    body.readinto(memoryview(buffer))

    assert bytes(buffer) == b"abcd"
    with pytest.raises(ConnectError, match="2 bytes early"):
        body.readinto(memoryview(buffer))


def test_random_tensors_are_seeded_and_hold_every_kind_of_value() -> None:
    values = random_tensor((4096,), torch.float8_e5m2)

    assert torch.equal(values.view(torch.uint8), random_tensor((4096,), torch.float8_e5m2).view(torch.uint8))
    assert values.float().isnan().any()
    assert values.float().isinf().any()
    assert (values.float() < 0).any()


def test_scattered_positions_have_gaps_and_neighbours() -> None:
    assert scattered_positions(7).tolist() == [1, 2, 5, 7, 8, 11, 13]
    assert scattered_positions(0).tolist() == []


def test_a_pair_hands_over_what_the_transport_sends() -> None:
    pair = joined(WireServerChannel, WireClientChannel)
    received, metadata = pair.transfer("t", {"rows": torch.arange(3)}, {"a": "b"})

    assert isinstance(received, PackedTensors)
    assert received["rows"].tolist() == [0, 1, 2]
    assert metadata == {"a": "b"}
