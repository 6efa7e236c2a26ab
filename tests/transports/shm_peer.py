"""A server's end of `shm` in a process of its own, and what a client needs to speak with it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from eagle_target_shm.options import ShmOptions
from eagle_target_shm.server import ShmServerChannel, ShmServerEndpoint

from eagle_target.errors import EagleTargetError
from eagle_target.testing.transport_harness import DTYPES, random_tensor
from tests.faults.processes import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.connection import Connection

SECONDS = 60.0


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    """Every dtype, something large, and nothing."""
    tensors = {f"rows_{index}": random_tensor((7, 5 + index), kind, seed=seed) for index, kind in enumerate(DTYPES)}
    large = random_tensor((1 << 10, 1 << 10), torch.float32, seed=seed)
    return {**tensors, "large": large, "none": torch.empty(0, 4), "strided": large[::3, 1::2]}


def serve(pipe: Connection, device: str, options: Mapping[str, Any]) -> None:
    """Answer until the other end is gone."""
    torch.empty(1, device=device)
    endpoint = ShmServerEndpoint(ShmOptions(**options))
    channels: list[ShmServerChannel] = []
    with contextlib.suppress(EOFError):
        while True:
            command, argument = pipe.recv()
            try:
                pipe.send(_answer(endpoint, channels, device, command, argument))
            except EagleTargetError as error:
                pipe.send(error)


def _answer(
    endpoint: ShmServerEndpoint, channels: list[ShmServerChannel], device: str, command: str, argument: Any
) -> Any:
    if command == "offer":
        return endpoint.offer()
    if command == "accept":
        channel, answer = endpoint.accept(argument, reached_at="127.0.0.1")
        assert isinstance(channel, ShmServerChannel)
        channels.append(channel)
        return answer
    if command == "used":
        return channels[-1].used_bytes
    answer = channels[-1].new_tensors()
    for name, tensor in tensors_of(argument).items():
        if name == "large":
            answer.allocate(name, tensor.shape, tensor.dtype).write(0, tensor.to(device))
        else:
            answer.put(name, tensor.to(device))
    reply = channels[-1].send(f"t{argument}", answer, {"seed": str(argument)})
    return reply.content_type, b"".join(reply.parts)


class Peer:
    """The server's process. As a control plane it opens channels there."""

    def __init__(self, device: str, **options: Any) -> None:
        self._pipe, there = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(there, device, options), daemon=True)
        self.process.start()
        there.close()
        self.address = "127.0.0.1"
        self.is_private = False
        self.device = self.target_device = device

    def ask(self, command: str, argument: Any = None) -> Any:
        self._pipe.send((command, argument))
        assert self._pipe.poll(SECONDS), "the server's process does not answer"
        answer = self._pipe.recv()
        if isinstance(answer, EagleTargetError):
            raise answer
        return answer

    def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self.ask("accept", dict(hello))
        return answer

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        raise NotImplementedError(f"{message} in {timeout} s")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


@contextlib.contextmanager
def peer(device: str, **options: Any) -> Iterator[Peer]:
    running = Peer(device, **options)
    try:
        yield running
    finally:
        running.kill()
