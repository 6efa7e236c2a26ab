"""The sglang adapter passes the suites that every adapter passes, on the real engine in processes of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from eagle_target_sglang import SGLangAdapter

from eagle_target.checkpoints.digest import checkpoint_digest
from eagle_target.testing.adapter_checkpoints import WholeCheckpointConformance
from eagle_target.testing.adapter_served import ServedAdapterConformance
from eagle_target.testing.adapters import AdapterConformance, BFloat16Adapter

if TYPE_CHECKING:
    from eagle_target.testing.adapter_suite import LoadedTarget

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]


class TestSGLangAdapter(AdapterConformance, BFloat16Adapter, WholeCheckpointConformance):
    adapter = SGLangAdapter
    # A second engine of a process is refused, and the suite loads several.
    options: ClassVar[dict[str, Any]] = {"in_process": False}

    def test_the_checkpoint_s_weights_are_known(self, target: LoadedTarget) -> None:
        assert target.runner.info.weights == checkpoint_digest(str(target.checkpoint)) is not None


class TestSGLangAdapterServed(ServedAdapterConformance):
    """The engine in the server's process, as it is by default."""

    adapter = SGLangAdapter
