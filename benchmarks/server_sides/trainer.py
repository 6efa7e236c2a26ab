"""A trainer whose step is real matrix work: `python -m benchmarks.server_sides.trainer MODEL|URL ENCODING WORKLOAD`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import answer_commands
from eagle_target.bench.loop import time_batches
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.targets import load_target
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from eagle_target.backend import Eagle3TargetBackend

STEP_SIZE = 1024


class Trainer:
    """Trains nothing, but for as long as a step takes.

    Args:
        target: where batches come from. workload: their sizes.
    """

    def __init__(self, target: Eagle3TargetBackend, workload: Workload) -> None:
        self._target = target
        self._workload = workload
        vocab_size = int(target.model_info()["vocab_size"])
        target.set_vocab_mapping(workload.make_mapping(vocab_size))
        self._inputs = workload.make_inputs(vocab_size, seed=0)
        self._matrix = torch.randn(STEP_SIZE, STEP_SIZE)

    def step(self, repeats: int) -> None:
        """The work of one step."""
        for _ in range(repeats):
            self._matrix @ self._matrix

    def calibrate(self, share: float) -> dict[str, Any]:
        """How many repeats take a share of a batch's time, each by itself."""
        self._target.generate_batch(*self._inputs[0])
        batch = statistics.median(_timed(lambda: self._target.generate_batch(*self._inputs[0])) for _ in range(3))
        self.step(2)
        work = statistics.median(_timed(lambda: self.step(4)) for _ in range(3)) / 4
        return {"repeats": max(1, round(share * batch / work)), "batch_seconds": batch}

    def run(self, seconds: float, depth: int, repeats: int) -> dict[str, Any]:
        """Take batches and steps for so long: seconds of each pair, and tokens of one."""
        taken = time_batches(
            lambda items: self._target.prefetch(items, depth),
            self._inputs,
            seconds=seconds,
            step=lambda: self.step(repeats),
        )
        return {"seconds": taken, "tokens": self._workload.real_tokens}


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    source, encoding, workload = sys.argv[1:]
    target: Eagle3TargetBackend
    if "://" in source:
        target = RemoteEagle3TargetModel.from_urls([source], encoding=encoding)
    else:
        target = load_target("hf", source, encoding=encoding)
    trainer = Trainer(target, Workload(**json.loads(workload)))
    answer_commands({"run": trainer.run, "calibrate": trainer.calibrate})
    target.close()


if __name__ == "__main__":
    main()
