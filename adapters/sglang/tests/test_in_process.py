"""The engine in this process: the suite again, and the second engine that is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from eagle_target_sglang import SGLangAdapter, SGLangOptions

from eagle_target.errors import AdapterError
from eagle_target.testing.adapter_contract import AdapterContractConformance
from eagle_target.testing.adapters import AdapterParityConformance

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.testing.adapter_suite import LoadedTarget

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]


class TestInProcess(AdapterParityConformance, AdapterContractConformance):
    """The first target of the class, which most tests use, is in this process; the others need their own."""

    adapter = SGLangAdapter
    _has_one: ClassVar[bool] = False

    @classmethod
    def load(cls, checkpoint: Path, **more_options: Any) -> TargetRunner:
        first, TestInProcess._has_one = not cls._has_one, True
        return super().load(checkpoint, **{"in_process": first, **more_options})

    def test_a_second_engine_of_a_process_is_refused(self, target: LoadedTarget) -> None:
        with pytest.raises(AdapterError, match="one a process: use in_process=false"):
            SGLangAdapter.load(str(target.checkpoint), SGLangOptions(in_process=True))

    def test_no_logits_are_made_but_those_asked_for(
        self, target: LoadedTarget, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from eagle_target_sglang.runner import SGLangTargetRunner

        assert isinstance(target.runner, SGLangTargetRunner)
        processor = target.runner._capture.processor
        rows: list[int] = []
        own = processor._compute_lm_head

        def count(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            rows.append(len(hidden))
            return own(hidden, *args, **kwargs)

        monkeypatch.setattr(processor, "_compute_lm_head", count)
        target.forward(target.sequences([40, 30, 20]))
        assert rows == [1]
