"""The inprocess transport passes the suite, but for what takes two processes."""

from __future__ import annotations

from typing import ClassVar

from eagle_target_inprocess.transport import InProcessTransport

from eagle_target.testing.transports import InProcessTransportConformance


class TestInProcessTransport(InProcessTransportConformance):
    transport = InProcessTransport
    large_bytes: ClassVar[int] = 256 << 20
