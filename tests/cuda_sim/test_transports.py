"""The suites of transports with tensors on devices, and batches that travel from one device to another."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from eagle_target_inprocess.transport import InProcessTransport
from eagle_target_nccl.transport import NcclTransport
from eagle_target_shm.transport import ShmTransport
from eagle_target_wire.transport import WireTransport

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.plugins.options import build_model
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from eagle_target.testing.transport_harness import ChannelPair, MemoryControl
from eagle_target.testing.transports import TransportChannelConformance, TransportTensorConformance
from tests.cuda_sim.targets import DeviceRunner, SupervisingDeviceRunner, served

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.plugins.transport import ServerEndpoint
    from tests.cuda_sim.device import Machine

ENCODINGS = ("probs", "hidden", "logits")


@pytest.mark.usefixtures("peers")
class OnADevice(TransportTensorConformance, TransportChannelConformance):
    """Everything that a channel does, with tensors of a device.

    every_seed: what an order can break; garbage or one dtype more it cannot. rest_seeds: in how many the rest runs.
    """

    every_seed = frozenset(
        {
            "test_all_dtypes_at_once",
            "test_strided_tensors",
            "test_views_of_one_memory",
            "test_large_tensor",
            "test_sent_tensors_are_left_alone",
            "test_a_sink_may_scatter",
            "test_transfers_are_received_in_any_order",
            "test_the_server_may_let_go_of_what_it_sent",
            "test_transfers_from_several_threads_on_one_channel",
            "test_several_channels_at_a_time",
            "test_closes_with_a_transfer_that_nobody_received",
        }
    )
    rest_seeds = 1
    device = "cuda:0"
    large_bytes = 1 << 20


class TestWire(OnADevice):
    transport = WireTransport


class TestInProcess(OnADevice):
    transport = InProcessTransport


class TestShm(OnADevice):
    transport = ShmTransport
    options: ClassVar[Mapping[str, Any]] = {"max_bytes": 16 << 20, "cuda_bytes": 16 << 20}


class TestNccl(OnADevice):
    transport = NcclTransport

    def join(self, endpoint: ServerEndpoint) -> ChannelPair:
        """NCCL joins no two ends on one device."""
        return _TwoDevices(endpoint)


class _TwoDevices(ChannelPair):
    def __init__(self, endpoint: ServerEndpoint) -> None:
        control = MemoryControl(endpoint, device="cuda:1", target_device="cuda:0")
        options = build_model(NcclTransport.options_model, {}, "options")
        self.client = NcclTransport.connect(options, json.loads(json.dumps(endpoint.offer())), control)
        self.server = control.accepted[0]


@pytest.mark.parametrize("transport", ["wire", "shm", "nccl", "inprocess"])
def test_batches_of_a_server_are_the_ones_of_a_target_here(
    machine: Machine, peers: None, transport: str, seed: int
) -> None:
    encoding: Any = ENCODINGS[seed % len(ENCODINGS)]
    load = (DeviceRunner, SupervisingDeviceRunner)[seed % 2]
    rows = trainer_rows()
    process = "server" if transport == "inprocess" else "trainer"
    with served(machine, load, max_batch_tokens=96) as url, machine.in_process(process):
        torch.cuda.set_device(1)
        with RemoteEagle3TargetModel.from_urls([url], device="cuda", encoding=encoding, transport=transport) as client:
            client.set_vocab_mapping(shuffled_mapping(211, 50))
            assert client.model_info()["servers"][0]["transport"] == transport
            batches = [client.generate_batch(**rows[0]), *client.prefetch(rows, depth=2)]
            # What a batch is finished with is not waited for: see F32.
            torch.cuda.current_stream("cuda:1").synchronize()
            received = [batch.tensors() for batch in batches]
            assert [sync.site for sync in machine.syncs if sync.kind == "device"] == []
    for given, wanted in zip(received, expected([rows[0], *rows], encoding), strict=True):
        assert {tensor.device for tensor in given.values()} == {torch.device("cuda:1")}
        assert_same_bits(given, wanted)


def expected(rows: list[dict[str, torch.Tensor]], encoding: Any) -> list[Mapping[str, torch.Tensor]]:
    with RunnerEagle3TargetModel(EmbeddingRunner(), encoding=encoding) as colocated:
        colocated.set_vocab_mapping(shuffled_mapping(211, 50))
        return [colocated.generate_batch(**each).tensors() for each in rows]


def trainer_rows() -> list[dict[str, torch.Tensor]]:
    """Rows padded on both sides, and packed rows."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 211, (3, 24), generator=draw)
    loss_mask = torch.randint(0, 2, (3, 24), generator=draw)
    columns = torch.arange(24)
    padded = ((columns >= torch.tensor([[0], [5], [0]])) & (columns < torch.tensor([[24], [20], [9]]))).long()
    rows = {"input_ids": ids, "loss_mask": loss_mask}
    documents = torch.tensor([[24, 0, 0], [10, 14, 0], [1, 22, 1]])
    return [
        {**rows, "attention_mask": padded},
        {**rows, "attention_mask": torch.ones_like(ids), "seq_lens": documents},
    ]
