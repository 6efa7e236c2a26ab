"""What the transport suites share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from eagle_target.plugins.options import build_model
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.transport_harness import ChannelPair, random_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.plugins.transport import ServerEndpoint, Transport


class TransportSuite:
    """What the suites share.

    transport: the class under test. options: its options, on both ends. device: of the tensors that are sent.
    large_bytes: size of the large tensor. patience: seconds after which a typed error is late.
    """

    transport: ClassVar[type[Transport]]
    options: ClassVar[Mapping[str, Any]] = {}
    device: ClassVar[str] = "cpu"
    large_bytes: ClassVar[int] = 64 << 20
    patience: ClassVar[float] = 20.0

    @pytest.fixture
    def endpoint(self) -> Iterator[ServerEndpoint]:
        """The server's end, without a server."""
        options = build_model(self.transport.options_model, self.options, "options")
        endpoint = self.transport.listen(options)
        yield endpoint
        endpoint.close()

    @pytest.fixture
    def pair(self, endpoint: ServerEndpoint) -> Iterator[ChannelPair]:
        """One channel, without a server."""
        pair = self.join(endpoint)
        yield pair
        pair.close()

    def join(self, endpoint: ServerEndpoint) -> ChannelPair:
        """Open a channel on an endpoint."""
        return ChannelPair(self.transport, endpoint, self.options, device=self.device)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Random bits on the suite's device."""
        return random_tensor(shape, dtype, seed=seed).to(self.device)

    def check(self, pair: ChannelPair, tensors: Mapping[str, torch.Tensor], transfer_id: str = "t") -> None:
        """Send tensors and compare what arrives."""
        received, metadata = pair.transfer(transfer_id, tensors, {"id": transfer_id})
        assert_same_bits(received, tensors)
        assert metadata == {"id": transfer_id}

    @property
    def server_settings(self) -> dict[str, Any]:
        """Settings of a server that offers this transport and no other."""
        return {"transports": (self.transport.name,), "transport_options": {self.transport.name: dict(self.options)}}
