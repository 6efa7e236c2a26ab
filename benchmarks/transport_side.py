"""One end, or both, of `benchmarks/transports.py`: `python -m benchmarks.transport_side server|client|both`.

A real HTTP server on a target that has its supervision ready, and real clients; only the model is missing.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import answer_commands
from benchmarks.wire_sides import prepared
from benchmarks.wire_sides.clients import time_batches
from benchmarks.wire_sides.target import PreparedRunner
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.compute.layout import read_trainer_rows
from eagle_target.config import ServerConfig
from eagle_target.contract.sinks import PackedTensors, RowStore
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.memory import BufferPool
from eagle_target.plugins.registry import load_plugins
from eagle_target.protocol import messages
from eagle_target.server.run import HttpServer
from eagle_target.testing.transport_harness import ServerClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.request import SupervisionRequest

TIMEOUT_SECONDS = 120.0
LARGEST_BYTES = 3 << 30


class PooledTensors(PackedTensors):
    """A sink in memory that is used again, as a client's batches are."""

    def __init__(self, pool: BufferPool) -> None:
        super().__init__()
        self._pool = pool

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a packed store in the pool's memory."""
        self[name] = self._pool.allocate(shape, dtype)
        return RowStore(self[name])


def start_server(transports: Sequence[str], tokens: int) -> tuple[HttpServer, prepared.Supervision]:
    """Serve prepared supervision of up to so many tokens."""
    supervision = prepared.make_supervision(tokens)
    options = {name: {"max_bytes": LARGEST_BYTES} for name in transports if name == "shm"}
    config = ServerConfig(model="prepared", port=0, transports=tuple(transports), transport_options=options)
    server = HttpServer(config, load=lambda: PreparedRunner(supervision, written=True))
    server.start()
    return server, supervision


class Client:
    """Asks one server for prepared supervision."""

    def __init__(self, url: str, transport: str) -> None:
        self._mapping = VocabMapping.from_ids(prepared.selected_token_ids(), prepared.VOCAB)
        self._pool = BufferPool()
        self._target = RemoteEagle3TargetModel.from_urls([url], transport=transport, timeout=TIMEOUT_SECONDS)
        self._target.set_vocab_mapping(self._mapping)
        self._channel = ServerClient(url, load_plugins().transports.get(transport), {}, timeout=TIMEOUT_SECONDS)

    def close(self) -> None:
        """Close the connections."""
        self._channel.__exit__(None, None, None)
        self._target.close()

    def batches(self, count: int, tokens: int) -> dict[str, Any]:
        """From the request to the finished batch: seconds of each, and the bytes of one."""
        inputs = prepared.make_trainer_inputs(tokens)

        def generate() -> Eagle3TargetBatch:
            return self._target.generate_batch(*inputs)

        return {"seconds": time_batches(generate, count=count, hold=0)}

    def transfers(self, count: int, tokens: int) -> dict[str, Any]:
        """Seconds of each transfer, from the supervision being made to its tensors here; of whole cycles; bytes."""
        request = self._request(tokens)
        seconds, cycles, moved = [], [], 0
        for _ in range(count):
            started = time.perf_counter()
            received, made_in = self._receive(request)
            cycles.append(time.perf_counter() - started)
            seconds.append(cycles[-1] - made_in)
            moved = sum(tensor.nbytes for tensor in received.values())
            del received
        return {"seconds": seconds, "cycles": cycles, "bytes": moved}

    def digest(self) -> dict[str, Any]:
        """What was received, to be compared with what was sent."""
        received, _ = self._receive(self._request(prepared.TOKENS))
        return {"digest": prepared.supervision_digest(received["aux_hidden_states"], _padded(received["target_probs"]))}

    def _receive(self, request: SupervisionRequest) -> tuple[PackedTensors, float]:
        received = PooledTensors(self._pool)
        body = self._channel.ask(request)
        made_in = _server_seconds(body.headers[messages.TIMINGS])
        try:
            self._channel.receive(body, received)
        finally:
            body.close()
        return received, made_in

    def _request(self, tokens: int) -> SupervisionRequest:
        rows = read_trainer_rows(*prepared.make_trainer_inputs(tokens), vocab_size=prepared.VOCAB)
        return rows.request(encoding="probs", rows="supervised", mapping=self._mapping, probs_dtype=torch.float32)

    def commands(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """What the process of a client answers."""
        return {"batches": self.batches, "transfers": self.transfers, "digest": self.digest}


def _padded(probs: torch.Tensor) -> torch.Tensor:
    """With the last position's row, which bears no loss and is not sent."""
    return torch.cat([probs, probs[:1]])


def _server_seconds(timings: str) -> float:
    """Seconds a request spent in the queue and in being made, of a `Server-Timing` header."""
    return sum(float(stage.partition("dur=")[2]) for stage in timings.split(",")) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("server", "both"):
        side = commands.add_parser(name)
        side.add_argument("transports")
        side.add_argument("tokens", type=int)
    client = commands.add_parser("client")
    client.add_argument("url")
    client.add_argument("transport")
    arguments = parser.parse_args()
    if arguments.command == "client":
        end = Client(arguments.url, arguments.transport)
        answer_commands(end.commands())
        end.close()
        return
    server, supervision = start_server(arguments.transports.split(","), arguments.tokens)
    sent = prepared.supervision_digest(
        supervision.aux[: prepared.TOKENS], _padded(supervision.probs[: prepared.TOKENS - 1])
    )
    facts: dict[str, Callable[..., dict[str, Any]]] = {
        "port": lambda: {"port": server.port},
        "digest": lambda: {"digest": sent},
    }
    if arguments.command == "server":
        answer_commands(facts)
    else:
        end = Client(server.url, arguments.transports)
        answer_commands({**facts, **end.commands(), "sent": facts["digest"]})
        end.close()
    server.close()


if __name__ == "__main__":
    main()
