"""A machine of fake GPUs for each test, once for each seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cuda_sim.patches import fake_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cuda_sim.device import Machine
    from tests.cuda_sim.tensors import World


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes a seed once for each of `--cuda-sim-seeds`."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--cuda-sim-seeds")), ids="seed{}".format)


@pytest.fixture
def world(seed: int) -> Iterator[World]:
    """A machine whose queues run in the order of the seed; torch sees it until the test is over."""
    with fake_cuda(seed) as world:
        yield world


@pytest.fixture
def machine(world: World) -> Machine:
    """The machine of `world`."""
    return world.machine
