"""The wire transport passes the suite that every transport passes."""

from __future__ import annotations

from eagle_target_wire.transport import WireTransport

from eagle_target.testing.transports import TransportConformance


class TestWireTransport(TransportConformance):
    transport = WireTransport
