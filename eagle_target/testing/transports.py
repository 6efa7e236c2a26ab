"""The conformance suite of transports.

    class TestMine(TransportConformance):
        transport = MyTransport
        options = {}

A transport that needs client and server in one process takes `InProcessTransportConformance`.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ConfigError, ProtocolError, TransportError
from eagle_target.plugins.options import PluginOptions, build_model
from eagle_target.plugins.registry import load_plugins
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.transport_harness import (
    DTYPES,
    ChannelPair,
    MemoryBody,
    ScatteringSink,
    random_tensor,
    scattered_positions,
)
from eagle_target.testing.transport_server import TransportFaultConformance, TransportServerConformance
from eagle_target.testing.transport_suite import TransportSuite

if TYPE_CHECKING:
    from eagle_target.plugins.transport import ServerEndpoint

IMPORT_CHECK = """
import importlib, sys
importlib.import_module(sys.argv[1])
assert "torch" not in sys.modules, f"importing {sys.argv[1]} imports torch"
"""


class TransportPluginConformance(TransportSuite):
    """The transport as a plugin: found, cheap to import, and described."""

    def test_is_registered_under_its_name(self) -> None:
        assert load_plugins().transports.get(self.transport.name) is self.transport

    def test_importing_its_package_imports_no_torch(self) -> None:
        package = self.transport.__module__.partition(".")[0]
        result = subprocess.run(
            [sys.executable, "-c", IMPORT_CHECK, package], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr

    def test_every_option_is_described(self) -> None:
        assert issubclass(self.transport.options_model, PluginOptions)
        for name, field in self.transport.options_model.model_fields.items():
            assert field.description, f"option {name} has no description"

    def test_an_unknown_option_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no_such_option"):
            build_model(self.transport.options_model, {**self.options, "no_such_option": 1}, "options")

    def test_can_work_on_this_machine(self) -> None:
        assert self.transport.unusable_reason() is None


class TransportTensorConformance(TransportSuite):
    """What goes in comes out, bit for bit."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, pair: ChannelPair, dtype: torch.dtype) -> None:
        self.check(pair, {"rows": self.tensor(7, 5, dtype=dtype)})

    def test_all_dtypes_at_once(self, pair: ChannelPair) -> None:
        self.check(pair, {f"rows_{index}": self.tensor(3, 1 + index, dtype=d) for index, d in enumerate(DTYPES)})

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (1,), (3, 0, 2), (2, 3, 4, 5)], ids=str)
    def test_empty_and_odd_shapes(self, pair: ChannelPair, shape: tuple[int, ...]) -> None:
        self.check(pair, {"odd": self.tensor(*shape), "beside": self.tensor(4, 2)})

    def test_nothing_but_empty_tensors(self, pair: ChannelPair) -> None:
        self.check(pair, {"a": self.tensor(0, 8), "b": self.tensor(0, dtype=torch.int32)})

    def test_strided_tensors(self, pair: ChannelPair) -> None:
        whole = self.tensor(12, 10)
        strided = {"transposed": whole.T, "steps": whole[::3, 1::2], "expanded": whole[:1].expand(6, 10)}
        self.check(pair, strided)

    def test_views_of_one_memory(self, pair: ChannelPair) -> None:
        whole = self.tensor(10, 4)
        self.check(pair, {"first": whole[:5], "second": whole[3:], "same": whole})

    def test_large_tensor(self, pair: ChannelPair) -> None:
        self.check(pair, {"large": self.tensor(self.large_bytes // 4096, 1024), "small": self.tensor(3, 3)})

    def test_many_tensors(self, pair: ChannelPair) -> None:
        self.check(pair, {f"part.{index:03}": self.tensor(index % 5, 3, seed=index) for index in range(200)})

    def test_metadata(self, pair: ChannelPair) -> None:
        metadata = {"plain": "x", "empty": "", "unicode": "é漢\U0001f600", "quotes": '"\\\n\t', "long": "y" * 5000}
        _, received = pair.transfer("t", {"rows": self.tensor(2, 2)}, metadata)
        assert received == metadata
        _, received = pair.transfer("u", {"rows": self.tensor(2, 2)}, {})
        assert received == {}

    def test_sent_tensors_are_left_alone(self, pair: ChannelPair) -> None:
        rows = self.tensor(64, 8)
        before = rows.clone()
        self.check(pair, {"rows": rows})
        assert_same_bits({"rows": rows}, {"rows": before})

    def test_a_sink_may_scatter(self, pair: ChannelPair) -> None:
        tensors = {"wide": self.tensor(50, 33), "flat": self.tensor(20, dtype=torch.int32), "none": self.tensor(0, 4)}
        sink = ScatteringSink()
        pair.client.receive(MemoryBody.of(pair.server.send("t", tensors, {})), sink)
        taken = {name: store.out[scattered_positions(len(tensors[name]))] for name, store in sink.stores.items()}
        assert_same_bits(taken, tensors)
        for name, store in sink.stores.items():
            others = torch.ones(len(store.out), dtype=torch.bool)
            others[scattered_positions(len(tensors[name]))] = False
            assert not store.out[others].any(), f"{name}: rows between the scattered ones were written"


class TransportChannelConformance(TransportSuite):
    """Many transfers, and the end of a channel."""

    def test_transfers_are_received_in_any_order(self, pair: ChannelPair) -> None:
        tensors = [{"rows": self.tensor(10, 10, seed=index)} for index in range(6)]
        replies = [pair.server.send(f"t{index}", each, {"n": str(index)}) for index, each in enumerate(tensors)]
        for index in (3, 0, 5, 1, 4, 2):
            received = PackedTensors()
            assert pair.client.receive(MemoryBody.of(replies[index]), received) == {"n": str(index)}
            assert_same_bits(received, tensors[index])

    def test_the_server_may_let_go_of_what_it_sent(self, pair: ChannelPair) -> None:
        tensors = {"rows": self.tensor(256, 1024)}
        expected = {"rows": tensors["rows"].clone()}
        reply = pair.server.send("t", tensors, {})
        del tensors
        gc.collect()
        random_tensor((256, 1024), torch.float32, seed=1)
        received = PackedTensors()
        pair.client.receive(MemoryBody.of(reply), received)
        assert_same_bits(received, expected)

    def test_transfers_from_several_threads_on_one_channel(self, pair: ChannelPair) -> None:
        self._transfer_from_threads([pair])

    def test_several_channels_at_a_time(self, endpoint: ServerEndpoint) -> None:
        pairs = [self.join(endpoint) for _ in range(4)]
        self._transfer_from_threads(pairs)
        pairs[0].close()
        self.check(pairs[1], {"rows": self.tensor(5, 5)}, "after")
        for pair in pairs:
            pair.close()

    def test_a_transfer_is_not_received_twice_as_another(self, pair: ChannelPair) -> None:
        reply = pair.server.send("t", {"rows": self.tensor(5, 5)}, {})
        received = PackedTensors()
        pair.client.receive(MemoryBody.of(reply), received)
        again = PackedTensors()
        with contextlib.suppress(TransportError):
            pair.client.receive(MemoryBody.of(reply), again)
            assert_same_bits(again, received)

    def test_closes_twice(self, endpoint: ServerEndpoint) -> None:
        pair = self.join(endpoint)
        self.check(pair, {"rows": self.tensor(5, 5)})
        pair.close()
        pair.close()
        endpoint.close()
        endpoint.close()

    def test_closes_with_a_transfer_that_nobody_received(self, endpoint: ServerEndpoint) -> None:
        pair = self.join(endpoint)
        pair.server.send("t", {"rows": self.tensor(64, 64)}, {})
        pair.close()

    def test_receiving_after_close_is_an_error(self, pair: ChannelPair) -> None:
        reply = pair.server.send("t", {"rows": self.tensor(5, 5)}, {})
        pair.client.close()
        with pytest.raises(TransportError):
            pair.client.receive(MemoryBody.of(reply), PackedTensors())

    @pytest.mark.parametrize(
        "garbage", [b"", b"abc", b"{}", b"null", b"[1]", bytes(8), b"\xff" * 300, bytes(range(256)) * 40], ids=len
    )
    def test_garbage_is_a_protocol_error(self, pair: ChannelPair, garbage: bytes) -> None:
        content_type = pair.server.send("t", {"rows": self.tensor(5, 5)}, {}).content_type
        with pytest.raises(ProtocolError):
            pair.client.receive(MemoryBody(content_type, garbage), PackedTensors())

    def test_a_body_of_another_type_is_a_protocol_error(self, pair: ChannelPair) -> None:
        body = MemoryBody.of(pair.server.send("t", {"rows": self.tensor(5, 5)}, {}))
        body.content_type = "text/html"
        with pytest.raises(ProtocolError):
            pair.client.receive(body, PackedTensors())

    def test_a_body_cut_short_is_a_transport_error(self, pair: ChannelPair) -> None:
        data = b"".join(pair.server.send("t", {"rows": self.tensor(5, 5)}, {}).parts)
        content_type = pair.server.send("u", {"rows": self.tensor(5, 5)}, {}).content_type
        for kept in range(0, len(data), max(1, len(data) // 20)):
            with pytest.raises(TransportError):
                pair.client.receive(MemoryBody(content_type, data[:kept], len(data)), PackedTensors())
            with pytest.raises(ProtocolError):
                pair.client.receive(MemoryBody(content_type, data[:kept]), PackedTensors())
        self.check(pair, {"rows": self.tensor(5, 5)}, "after")

    def _transfer_from_threads(self, pairs: list[ChannelPair]) -> None:
        def transfer(number: int) -> None:
            rows = {"rows": self.tensor(200 + number, 128, seed=number), "ids": self.tensor(number, dtype=torch.int32)}
            self.check(pairs[number % len(pairs)], rows, f"t{number}")

        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(transfer, number) for number in range(32)]:
                done.result(self.patience)


class InProcessTransportConformance(
    TransportPluginConformance, TransportTensorConformance, TransportChannelConformance, TransportServerConformance
):
    """Everything but what takes two processes."""


class TransportConformance(InProcessTransportConformance, TransportFaultConformance):
    """Everything a transport must do."""
