"""Tests of the sglang adapter: without a mark they need no SGLang; `engine_sglang` runs the real one on the CPU.

Asking for a mark that cannot run fails, it does not skip.
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
    # Read when SGLang is imported, here or in a rank.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    marked = [item for item in items if any(mark in item.keywords for mark in OPTIONAL_MARKS)]
    config.hook.pytest_deselected(items=marked)
    items[:] = [item for item in items if item not in marked]


@pytest.fixture(autouse=True, scope="session")
def warm_ranks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fork ranks from one process that has imported SGLang, which takes 20 seconds; fail where there is none."""
    if not any("engine_sglang" in item.keywords for item in request.session.items):
        yield
        return
    reason = SGLangAdapter.unusable_reason()
    assert reason is None, reason
    with WarmRanks() as warm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "start_process", warm.start)
        yield
