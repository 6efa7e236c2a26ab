"""The wire transport passes the suite that every transport passes."""

from __future__ import annotations

from typing import ClassVar

from eagle_target_wire.transport import WireTransport

from eagle_target.testing.transports import TransportConformance


class TestWireTransport(TransportConformance):
    transport = WireTransport
    large_bytes: ClassVar[int] = 256 << 20
