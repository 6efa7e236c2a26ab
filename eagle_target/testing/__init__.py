"""A test kit for plugin authors: conformance suites, loopback servers and tiny targets. See docs/plugins.md."""

from __future__ import annotations

import sys

if "pytest" in sys.modules:
    import pytest

    # Asserts of the suites then show their values, as those of test modules do.
    for _module in (
        "adapters",
        "adapter_contract",
        "adapter_oracle",
        "adapter_served",
        "adapter_suite",
        "transports",
        "transport_harness",
        "transport_server",
        "transport_suite",
    ):
        pytest.register_assert_rewrite(f"{__name__}.{_module}")
