"""The hf adapter passes the suite that every adapter passes."""

from __future__ import annotations

from typing import ClassVar

from eagle_target_hf import HFAdapter

from eagle_target.testing.adapters import AdapterConformance, BFloat16Adapter


class TestHFAdapter(AdapterConformance, BFloat16Adapter):
    adapter = HFAdapter
    options: ClassVar[dict[str, str]] = {"device": "cpu"}
