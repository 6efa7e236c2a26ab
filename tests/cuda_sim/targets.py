"""Targets on a fake device, in this process and behind a server in one of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.compute.supervise import store_supervision
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import EmbeddingRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import TargetRunner
    from eagle_target.contract.sinks import Sink
    from tests.cuda_sim.device import Machine


SHARED_BYTES = 8 << 20


class DeviceRunner(EmbeddingRunner):
    """An `EmbeddingRunner` whose weights are on a device; it gives the bits that one on the CPU gives.

    Args:
        on: the device. options: of `EmbeddingRunner`.
    """

    def __init__(self, on: str = "cuda:0", **options: Any) -> None:
        super().__init__(**options)
        self._info = self._info.model_copy(update={"device": on})
        device = torch.device(on)
        self._embedding = self._embedding.to(device)
        self._layers = self._layers.to(device)
        self._head = self._head.to(device)

    def _run_sequence(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._embedding[ids].double()
        steps = torch.arange(1, len(ids) + 1, dtype=torch.float64, device=tokens.device)[:, None]
        mixed = tokens + (tokens * steps).cumsum(0) / steps.cumsum(0)
        states = [torch.tanh(mixed @ weight).to(self._dtype) for weight in self._layers]
        return torch.cat([states[layer] for layer in self._aux_layer_ids], dim=1), states[-1]


class SupervisingDeviceRunner(DeviceRunner):
    """One that projects by itself and puts tensors of its device, as vLLM in the server's process does."""

    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        """Answer requests one by one, all of it on this thread's stream, which is done at the end."""
        device = torch.device(self.info.device)
        for request, sink in zip(requests, sinks, strict=True):
            forward = self.forward_eagle3(request.input_ids.to(device), request.seq_lens)
            store_supervision(self, request, forward, sink)
        torch.cuda.current_stream(device).synchronize()
        return {"forward": 0.0, "projection": 0.0}


@contextmanager
def served(machine: Machine, load: Callable[[], TargetRunner] = DeviceRunner, **settings: Any) -> Iterator[str]:
    """A server in a process of its own; its URL."""
    options = {"shm": {"max_bytes": SHARED_BYTES, "cuda_bytes": SHARED_BYTES}}
    server = loopback_server(load, transport_options=options, **settings)
    with machine.in_process("server"):
        running = server.__enter__()
    try:
        yield running.url
    finally:
        server.__exit__(None, None, None)
