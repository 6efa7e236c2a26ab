"""The adapter and the transport of docs/plugins.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from eagle_target.plugins.registry import call_hooks
from eagle_target.testing.adapter_contract import AdapterContractConformance, AdapterServerConformance
from eagle_target.testing.adapters import AdapterParityConformance
from eagle_target.testing.transports import TransportTensorConformance

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


def run_page() -> dict[str, Any]:
    """Run the page's Python, one block after another."""
    names: dict[str, Any] = {"__name__": "documented_plugin"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if "AdapterConformance" not in block:
            exec(compile(block, str(PAGE), "exec"), names)  # the page is ours
    return names


NAMES = run_page()


class TestDocumentedAdapter(AdapterParityConformance, AdapterContractConformance, AdapterServerConformance):
    adapter = NAMES["PlainAdapter"]
    options: ClassVar[dict[str, Any]] = {"device": "cpu"}


class TestDocumentedTransport(TransportTensorConformance):
    transport = NAMES["PickyTransport"]


def test_documented_hook_registers_the_adapter() -> None:
    class Page:
        register_adapters = staticmethod(NAMES["register_adapters"])

    assert call_hooks(Page()) == ([NAMES["PlainAdapter"]], [])
