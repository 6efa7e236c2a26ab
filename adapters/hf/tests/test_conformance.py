"""The hf adapter passes the suites that every adapter passes, in this process and served from another."""

from __future__ import annotations

from typing import ClassVar

from eagle_target_hf import HFAdapter

from eagle_target.testing.adapter_checkpoints import WholeCheckpointConformance
from eagle_target.testing.adapter_served import ServedAdapterConformance
from eagle_target.testing.adapters import AdapterConformance, BFloat16Adapter


class TestHFAdapter(AdapterConformance, BFloat16Adapter, WholeCheckpointConformance):
    adapter = HFAdapter
    options: ClassVar[dict[str, str]] = {"device": "cpu"}


class TestHFAdapterServed(ServedAdapterConformance):
    adapter = HFAdapter
    options: ClassVar[dict[str, str]] = {"device": "cpu"}
