"""A machine of fake GPUs for each test, once for each seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cuda_sim.device import PURE
from tests.cuda_sim.patches import fake_cuda
from tests.cuda_sim.peers import install_peers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cuda_sim.device import Machine
    from tests.cuda_sim.tensors import World


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes a seed once for each of `--cuda-sim-seeds`.

    A class may name what it runs in every order, with `every_seed`: the rest of it then runs in the first `rest_seeds`.
    """
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "seed" not in metafunc.fixturenames or "seed" in given:
        return
    seeds = metafunc.config.getoption("--cuda-sim-seeds")
    every_seed = getattr(metafunc.cls, "every_seed", None)
    if every_seed is not None and metafunc.function.__name__ not in every_seed:
        seeds = min(seeds, getattr(metafunc.cls, "rest_seeds", len(PURE)))
    metafunc.parametrize("seed", range(seeds), ids="seed{}".format)


@pytest.fixture
def world(seed: int) -> Iterator[World]:
    """A machine whose queues run in the order of the seed; torch sees it until the test is over."""
    with fake_cuda(seed) as world:
        yield world


@pytest.fixture
def peers(world: World) -> Iterator[None]:
    """What connects processes on the machine: CUDA IPC for `shm`, NCCL for `nccl`."""
    with pytest.MonkeyPatch.context() as patch:
        install_peers(world, patch)
        yield


@pytest.fixture
def machine(world: World) -> Machine:
    """The machine of `world`."""
    return world.machine
