"""What every test has: tiny targets, loopback servers, one thread of torch and a clean environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["eagle_target.testing.fixtures"]

# The same random cases every time, and no deadline: other work may share the machine. `--hypothesis-profile long` has
# more of them, and others each time.
settings.register_profile("eagle-target", deadline=None, derandomize=True, database=None, max_examples=30)
settings.register_profile("long", deadline=None, database=None, max_examples=500)
settings.load_profile("eagle-target")

# A distribution of its own: tests/adapters/test_thirdparty.py installs it and runs its tests.
collect_ignore = ["thirdparty"]


# Run only when asked for by mark, and then they fail, rather than skip, where they cannot run.
OPTIONAL_MARKS = ("engine_vllm", "engine_sglang", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how often what runs on fake GPUs runs."""
    parser.addoption(
        "--cuda-sim-seeds",
        type=int,
        default=3,
        help="tests/cuda_sim: orders in which the fake device runs what was queued; the first three are the plain ones",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs an engine or a device, unless a mark is asked for."""
    if config.option.markexpr:
        return
    optional = [item for item in items if any(mark in item.keywords for mark in OPTIONAL_MARKS)]
    config.hook.pytest_deselected(items=optional)
    items[:] = [item for item in items if item not in optional]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Keep tiny matrices on one thread, here and in processes that tests start: they are slower on several."""
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)
    if variable is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = variable


@pytest.fixture(autouse=True)
def environment_is_left_alone(one_thread: None) -> Iterator[None]:
    """Fail a test that leaks settings into the environment of the next."""
    before = _settings()
    yield
    assert _settings() == before, "the test changed environment variables"


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("EAGLE_TARGET_")}
