"""A trainer without a draft, in a process of its own: `python -m eagle_target.bench.client`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from eagle_target.bench.loop import time_batches
from eagle_target.bench.processes import answer_commands, forget_peak, memory
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import BenchmarkError, EagleTargetError
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from eagle_target.auth import AccessFiles
    from eagle_target.bench.loop import Inputs

TIMEOUT_SECONDS = 300.0


class Client:
    """Connects, measures and disconnects as it is told."""

    def __init__(self) -> None:
        self._target: RemoteEagle3TargetModel | None = None
        self._workload = Workload()
        self._inputs: Inputs = ()
        self._threads = torch.get_num_threads()

    def connect(
        self,
        url: str,
        transport: str,
        encoding: Any,
        workload: dict[str, Any],
        seed: int,
        device: str = "cpu",
        access: AccessFiles | None = None,
        clients: int = 1,
    ) -> dict[str, Any]:
        """Connect and take a batch to warm up; answers `error` where that does not work.

        clients: that measure on this machine at the same time; each has its share of the cores, as ranks of one job do.
        """
        self.disconnect()
        forget_peak()
        torch.set_num_threads(max(1, self._threads // clients))
        self._workload = Workload(**workload)
        try:
            self._target = RemoteEagle3TargetModel.from_urls(
                [url],
                transport=transport,
                encoding=encoding,
                device=device,
                timeout=TIMEOUT_SECONDS,
                **(access or {}),
            )
            facts = self._target.model_info()
            self._inputs = self._workload.make_inputs(int(facts["vocab_size"]), seed)
            self._target.set_vocab_mapping(self._workload.make_mapping(int(facts["vocab_size"])))
            self._target.generate_batch(*self._inputs[0])
        except EagleTargetError as error:
            self.disconnect()
            return {"error": str(error)}
        return {"transport": facts["servers"][0]["transport"], "facts": facts}

    def run(self, seconds: float, depth: int) -> dict[str, Any]:
        """Take batches for so long: `seconds` of each batch, `tokens` of one, and what the client counted meanwhile."""
        if self._target is None:
            raise BenchmarkError("a client that is not connected cannot run: connect it")
        target, before = self._target, self._target.model_info()["traffic"]
        try:
            taken = time_batches(lambda items: target.prefetch(items, depth), self._inputs, seconds=seconds)
        except EagleTargetError as error:
            return {"error": str(error)}
        traffic = self._target.model_info()["traffic"]
        stages = {stage: spent - before["seconds"][stage] for stage, spent in traffic["seconds"].items()}
        return {
            "seconds": taken,
            "tokens": self._workload.real_tokens,
            "requests": traffic["requests"] - before["requests"],
            "received_tokens": traffic["tokens"] - before["tokens"],
            "received_bytes": traffic["bytes_received"] - before["bytes_received"],
            "stages": stages,
            "peak_rss_mb": memory()["peak_rss_mb"],
        }

    def disconnect(self) -> dict[str, Any]:
        """Close the connection, if there is one."""
        if self._target is not None:
            self._target.close()
            self._target = None
        return {}


def main() -> None:
    """Answer commands until there are no more."""
    client = Client()
    answer_commands({"connect": client.connect, "run": client.run, "disconnect": client.disconnect})
    client.disconnect()


if __name__ == "__main__":
    main()
