"""The suite of adapters with a target of transformers on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from eagle_target_hf import HFAdapter

from eagle_target.testing.adapter_contract import AdapterContractConformance, AdapterServerConformance
from eagle_target.testing.adapters import AdapterParityConformance
from tests.cuda_sim.patches import fake_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.cuda_sim.tensors import World


class TestHFOnADevice(AdapterParityConformance, AdapterContractConformance, AdapterServerConformance):
    """One loaded target for the class; the order is another for each test.

    every_seed: what runs in every order, rest_seeds: in how many the rest does, which would take minutes.
    """

    adapter = HFAdapter
    options: ClassVar[Mapping[str, Any]] = {"device": "cuda:1"}
    every_seed = frozenset(
        {
            "test_a_later_forward_leaves_earlier_tensors_alone",
            "test_another_thread_may_run_it",
            "test_logits_for_the_trainer",
        }
    )
    rest_seeds = 1

    @classmethod
    def make_checkpoint(cls, folder: Path, **sizes: Any) -> Path:
        """A narrow one: what costs time is the number of kernels."""
        return super().make_checkpoint(folder, hidden=16, heads=2, kv_heads=1, **sizes)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def world_of_the_class(cls) -> Iterator[World]:
        """A machine for all tests of the class."""
        with fake_cuda(0) as world:
            yield world

    @pytest.fixture(autouse=True)
    def order(self, world_of_the_class: World, seed: int) -> None:
        """Have queues run in the order of the test's seed from now on."""
        world_of_the_class.machine.seed = seed
