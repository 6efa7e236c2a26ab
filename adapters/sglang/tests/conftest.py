"""Tests of the sglang adapter: without a mark they need no SGLang; `engine_sglang` runs the real one on the CPU.

`gpu` runs it on CUDA, in a run of its own (`-m gpu`). Asking for a mark that cannot run fails, it does not skip.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from eagle_target_sglang import SGLangAdapter, ranks

from .warm import WarmRanks

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONAL_MARKS = ("engine_sglang", "gpu")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    marked = [item for item in items if any(mark in item.keywords for mark in OPTIONAL_MARKS)]
    config.hook.pytest_deselected(items=marked)
    items[:] = [item for item in items if item not in marked]


@pytest.fixture(autouse=True, scope="session")
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ready the environment for the real SGLang; fail where there is none.

    On the CPU ranks are forked from one process that has imported it, which takes 20 seconds; CUDA survives no fork.
    """
    marks = {mark for item in request.session.items for mark in OPTIONAL_MARKS if mark in item.keywords}
    if "engine_sglang" not in marks:
        yield
        return
    reason = SGLangAdapter.unusable_reason()
    assert reason is None, reason
    if "gpu" in marks:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        # Both are read when SGLang is imported, here or in a rank.
        patch.setenv("SGLANG_USE_CPU_ENGINE", os.environ.get("SGLANG_USE_CPU_ENGINE", "1"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with WarmRanks() as warm:
            patch.setattr(ranks, "start_process", warm.start)
            yield
