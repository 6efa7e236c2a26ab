"""A transport behind a real server, and with one that is killed or stalls."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import TransferTimeout, TransportError
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.server import embedding_process, loopback_server
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from eagle_target.testing.transport_harness import ServerClient, WatchedBody
from eagle_target.testing.transport_suite import TransportSuite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eagle_target.testing.server import ServerProcess


class TransportServerConformance(TransportSuite):
    """Batches from a real server are those of a target in this process, bit for bit."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
    def test_batches_are_the_colocated_ones(self, encoding: Any, dtype: str) -> None:
        def make() -> EmbeddingRunner:
            return EmbeddingRunner(dtype=getattr(torch, dtype), bias=True, soft_cap=20.0)

        with (
            loopback_server(make, **self.server_settings) as server,
            self.client(server.url, encoding=encoding) as client,
            RunnerEagle3TargetModel(make(), encoding=encoding) as colocated,
        ):
            for backend in (client, colocated):
                backend.set_vocab_mapping(shuffled_mapping(211, 50))
            assert client.model_info()["servers"][0]["transport"] == self.transport.name
            for arguments in _trainer_inputs():
                batches = [backend.generate_batch(**arguments).tensors() for backend in (client, colocated)]
                assert_same_bits(*batches)
            assert torch.equal(client.input_embedding_weight(), colocated.input_embedding_weight())

    def test_clients_share_a_server(self) -> None:
        arguments = _trainer_inputs()[0]
        with loopback_server(EmbeddingRunner, **self.server_settings) as server, contextlib.ExitStack() as open_clients:
            clients = [open_clients.enter_context(self.client(server.url, encoding="logits")) for _ in range(3)]
            expected = clients[0].generate_batch(**arguments).tensors()
            handles = [client.generate_batch_async(**arguments) for client in clients for _ in range(8)]
            clients[1].generate_batch(**arguments)
            for handle in handles:
                assert_same_bits(handle.result(self.patience).tensors(), expected)
            clients[2].close()
            assert_same_bits(clients[1].generate_batch(**arguments).tensors(), expected)

    def client(self, url: str, **options: Any) -> RemoteEagle3TargetModel:
        """A client that takes this transport or fails."""
        return RemoteEagle3TargetModel.from_urls(
            [url],
            transport=self.transport.name,
            transport_options={self.transport.name: dict(self.options)},
            timeout=self.patience,
            ready_timeout=self.patience,
            **options,
        )


class TransportFaultConformance(TransportSuite):
    """A peer in another process that is killed, or stalls, in the middle of a transfer.

    survives_peer_death: whether what was sent can still be received when the server is dead.
    """

    survives_peer_death: ClassVar[bool] = False
    timeout: ClassVar[float] = 2.0

    @pytest.fixture
    def process(self) -> Iterator[ServerProcess]:
        """A server in a process of its own, whose answers are larger than what sockets buffer."""
        with embedding_process({"vocab_size": 8192}, **self.server_settings) as process:
            yield process

    def test_server_killed_in_the_middle_of_a_transfer(self, process: ServerProcess) -> None:
        def kill() -> None:
            process.process.kill()
            process.process.wait(self.patience)

        started = time.monotonic()
        with self._connect(process.url, self.patience / 2) as client:
            if self.survives_peer_death:
                with contextlib.suppress(TransportError):
                    self._ask(client, kill)
            else:
                with pytest.raises(TransportError):
                    self._ask(client, kill)
        assert time.monotonic() - started < self.patience, "the error came late"

    def test_server_that_stalls_in_the_middle_of_a_transfer(self, process: ServerProcess) -> None:
        def stop() -> None:
            os.kill(process.process.pid, signal.SIGSTOP)
            # Returns when all its threads have stopped.
            os.waitpid(process.process.pid, os.WUNTRACED)

        started = time.monotonic()
        with self._connect(process.url, self.timeout) as client:
            if self.survives_peer_death:
                with contextlib.suppress(TransferTimeout):
                    self._ask(client, stop)
            else:
                with pytest.raises(TransferTimeout):
                    self._ask(client, stop)
        assert time.monotonic() - started < self.patience, "the error came late"

    def test_a_client_that_goes_away_does_not_hurt_the_next(self, process: ServerProcess) -> None:
        with self._connect(process.url, self.patience) as client:
            client.ask(_large_request()).close()
        with self._connect(process.url, self.patience) as client:
            assert self._ask(client, lambda: None)["logits"].shape == (511, 8192)

    def _connect(self, url: str, timeout: float) -> ServerClient:
        return ServerClient(url, self.transport, self.options, timeout=timeout)

    def _ask(self, client: ServerClient, before_reading: Callable[[], None]) -> PackedTensors:
        received = PackedTensors()
        body = client.ask(_large_request())
        try:
            client.receive(WatchedBody(body, before_reading), received)
        finally:
            body.close()
        return received


def _large_request() -> SupervisionRequest:
    mask = torch.ones(512, dtype=torch.bool)
    mask[0] = False
    return SupervisionRequest(input_ids=torch.arange(512), seq_lens=(512,), row_mask=mask, encoding="logits")


def _trainer_inputs() -> list[dict[str, torch.Tensor]]:
    """Rows padded on both sides, packed rows, and rows that bear no loss."""
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 211, (4, 24), generator=draw)
    loss_mask = torch.randint(0, 2, (4, 24), generator=draw)
    columns = torch.arange(24)
    padded = (
        (columns >= torch.tensor([[0], [5], [0], [3]])) & (columns < torch.tensor([[24], [24], [9], [20]]))
    ).long()
    whole = torch.ones_like(input_ids)
    documents = torch.tensor([[24, 0, 0], [10, 14, 0], [5, 5, 14], [1, 22, 1]])
    rows = {"input_ids": input_ids, "loss_mask": loss_mask}
    return [
        {**rows, "attention_mask": padded},
        {**rows, "attention_mask": whole, "seq_lens": documents},
        {"input_ids": input_ids, "attention_mask": whole, "loss_mask": torch.zeros_like(whole)},
    ]
