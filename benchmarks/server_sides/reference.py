"""The reference's side, in its own environment: `python -m benchmarks.server_sides.reference server|client`.

Its own server, client and HF target over its wire path. Its command line loads the checkpoint through the model classes
of its package, which need more of it than a target does; here transformers loads it, as for this project's adapter.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

# Its other path needs CUDA and SGLang on both sides; without them it takes this one by itself.
os.environ["NEMO_EAGLE_ENABLE_NCCL"] = "0"

import torch
from nemo_automodel.components.speculative.eagle.remote import server as reference_server
from nemo_automodel.components.speculative.eagle.remote.client import RemoteEagle3TargetModel
from nemo_automodel.components.speculative.eagle.target import HFEagle3TargetModel
from transformers import AutoModelForCausalLM

from benchmarks.processes import answer_commands, forget_peak, memory
from benchmarks.wire_sides.free_port import free_port
from eagle_target.bench.loop import time_batches
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from eagle_target.bench.loop import Inputs, Item


def run_server(model: str) -> None:
    """Serve a checkpoint until there are no more commands."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.requires_grad_(False)
    logic = reference_server.TargetModelServer(HFEagle3TargetModel(loaded), nccl_port=0, host="127.0.0.1")
    port = free_port()
    threading.Thread(target=reference_server.serve, args=(logic, "127.0.0.1", port), daemon=True).start()
    answer_commands({"port": lambda: {"port": port}})


class Client:
    """Answers what `eagle_target.bench.client` answers."""

    def __init__(self) -> None:
        self._target: Any = None
        self._received = self._batches = 0
        self._workload = Workload()
        self._inputs: Inputs = ()

    def connect(
        self,
        url: str,
        transport: str,
        encoding: str,
        workload: dict[str, Any],
        seed: int,
        device: str,
        access: dict[str, Any],
        clients: int,
    ) -> dict[str, Any]:
        """Connect and take a batch to warm up. One transport, one encoding, no access control, no second client."""
        del transport, encoding, access, clients
        forget_peak()
        self._workload = Workload(**workload)
        self._target = RemoteEagle3TargetModel.from_urls([url], device=device)
        self._count_bytes()
        vocab_size = self._target.model_info()["vocab_size"]
        mapping = self._workload.make_mapping(vocab_size)
        self._target.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        self._inputs = self._workload.make_inputs(vocab_size, seed)
        self._target.generate_batch(*self._inputs[0])
        return {"transport": "wire"}

    def run(self, seconds: float, depth: int) -> dict[str, Any]:
        """Take batches for so long."""
        self._received = self._batches = 0
        taken = time_batches(lambda items: self._prefetch(items, depth), self._inputs, seconds=seconds)
        return {
            "seconds": taken,
            "tokens": self._workload.real_tokens,
            "requests": self._batches,
            "received_tokens": self._batches * self._workload.real_tokens,
            "received_bytes": self._received,
            "stages": {},
            "peak_rss_mb": memory()["peak_rss_mb"],
        }

    def disconnect(self) -> dict[str, Any]:
        """Let go of the connection; its `close` would end the server."""
        self._target = None
        return {}

    def _prefetch(self, items: Iterable[Item], depth: int) -> Iterator[Any]:
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(self._target.generate_batch_async(*item))
            self._batches += 1
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _count_bytes(self) -> None:
        for server in self._target._clients:  # noqa: SLF001
            ask = server.request

            def counted(*arguments: Any, ask: Any = ask, **options: Any) -> bytes:
                answer: bytes = ask(*arguments, **options)
                self._received += len(answer)
                return answer

            server.request = counted


def main() -> None:
    kind, *rest = sys.argv[1:]
    if kind == "server":
        run_server(*rest)
        return
    client = Client()
    answer_commands({"connect": client.connect, "run": client.run, "disconnect": client.disconnect})


if __name__ == "__main__":
    main()
