"""A test kit for plugin authors: conformance suites, loopback servers and tiny targets. See docs/plugins.md.

Names are loaded on first use: a suite imports transformers, and pytest.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from eagle_target.lazy import load_name

if TYPE_CHECKING:
    from eagle_target.testing.adapter_checkpoints import WholeCheckpointConformance
    from eagle_target.testing.adapter_served import ServedAdapterConformance
    from eagle_target.testing.adapters import AdapterConformance, BatchInvariantAdapter, BFloat16Adapter
    from eagle_target.testing.comparison import assert_same_batch
    from eagle_target.testing.server import loopback_server, server_process
    from eagle_target.testing.tiny import EmbeddingRunner, save_tiny_target, shuffled_mapping
    from eagle_target.testing.transport_harness import MemoryControl
    from eagle_target.testing.transports import InProcessTransportConformance, TransportConformance

_HOMES = {
    "AdapterConformance": "adapters",
    "BFloat16Adapter": "adapters",
    "BatchInvariantAdapter": "adapters",
    "EmbeddingRunner": "tiny",
    "InProcessTransportConformance": "transports",
    "MemoryControl": "transport_harness",
    "ServedAdapterConformance": "adapter_served",
    "TransportConformance": "transports",
    "WholeCheckpointConformance": "adapter_checkpoints",
    "assert_same_batch": "comparison",
    "loopback_server": "server",
    "save_tiny_target": "tiny",
    "server_process": "server",
    "shuffled_mapping": "tiny",
}
_WITH_ASSERTS = (
    *("adapters", "adapter_checkpoints", "adapter_contract", "adapter_oracle", "adapter_served", "adapter_suite"),
    *("comparison", "transports", "transport_harness", "transport_server", "transport_suite"),
)

__all__ = [
    "AdapterConformance",
    "BFloat16Adapter",
    "BatchInvariantAdapter",
    "EmbeddingRunner",
    "InProcessTransportConformance",
    "MemoryControl",
    "ServedAdapterConformance",
    "TransportConformance",
    "WholeCheckpointConformance",
    "assert_same_batch",
    "loopback_server",
    "save_tiny_target",
    "server_process",
    "shuffled_mapping",
]

if "pytest" in sys.modules:
    import pytest

    # Asserts of the suites then show their values, as those of test modules do.
    for _module in _WITH_ASSERTS:
        pytest.register_assert_rewrite(f"{__name__}.{_module}")

__getattr__ = partial(load_name, __name__, _HOMES)
