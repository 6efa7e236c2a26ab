"""Tests of the vllm adapter: all on the real engine, marked `engine_vllm`, run by vLLM's own environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A tiny target is slower on several threads that spin; workers of other processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine_vllm)
            if "gpu" in item.keywords and not config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: ask for it with -m gpu"))
