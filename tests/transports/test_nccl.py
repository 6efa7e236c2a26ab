"""The nccl transport passes the suite that every transport passes: over TCP, and over NCCL on two GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_nccl import interfaces
from eagle_target_nccl.transport import NcclTransport

from eagle_target.plugins.options import build_model
from eagle_target.testing.transport_harness import ChannelPair, MemoryControl
from eagle_target.testing.transport_suite import TransportSuite
from eagle_target.testing.transports import (
    TransportChannelConformance,
    TransportConformance,
    TransportTensorConformance,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.plugins.transport import ServerEndpoint


class TestNcclTransport(TransportConformance):
    transport = NcclTransport


@pytest.mark.slow
class TestOneGigabyte(TransportSuite):
    transport = NcclTransport

    def test_one_tensor(self, pair: ChannelPair) -> None:
        self.check(pair, {"large": self.tensor(1 << 20, 512, dtype=torch.bfloat16)})


class TwoDevices(ChannelPair):
    """A channel between the first two GPUs: NCCL joins no two ends on one."""

    def __init__(self, endpoint: ServerEndpoint) -> None:
        control = MemoryControl(endpoint, device="cuda:1", target_device="cuda:0")
        self.client = NcclTransport.connect(
            build_model(NcclTransport.options_model, {}, "options"), endpoint.offer(), control
        )
        self.server = control.accepted[0]


@pytest.mark.gpu
class TestNcclTransportOnTwoDevices(TransportTensorConformance, TransportChannelConformance):
    transport = NcclTransport
    device = "cuda:0"

    @pytest.fixture(autouse=True, scope="class")
    def two_devices(self) -> Iterator[None]:
        assert torch.cuda.device_count() >= 2, f"needs two CUDA devices, there are {torch.cuda.device_count()}"
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(interfaces.SETTING, "=lo")
            yield

    def join(self, endpoint: ServerEndpoint) -> ChannelPair:
        return TwoDevices(endpoint)
