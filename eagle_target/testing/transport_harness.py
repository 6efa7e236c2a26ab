"""What the transport suite runs transports with: both ends without a server, and a client of a real one."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.client.http import ServerConnection
from eagle_target.client.lease import ChannelControl, Lease
from eagle_target.contract.sinks import PackedTensors, RowStore, scattered_store
from eagle_target.errors import ConnectError
from eagle_target.plugins.options import build_model
from eagle_target.protocol import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from eagle_target.client.http import ResponseBody
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink
    from eagle_target.plugins.transport import (
        ClientChannel,
        IncomingBody,
        Reply,
        ServerChannel,
        ServerEndpoint,
        Transport,
    )

BODY_SECONDS = 20.0
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class MemoryBody:
    """A body that has arrived in whole; past its end the connection is broken."""

    def __init__(self, content_type: str, data: bytes | bytearray, length: int | None = None) -> None:
        self.content_type = content_type
        self.length = len(data) if length is None else length
        self.deadline = time.monotonic() + BODY_SECONDS
        self._left = memoryview(data)

    def readinto(self, buffer: memoryview) -> None:
        """Fill the buffer.

        Raises:
            ConnectError: the body has fewer bytes.
        """
        if len(buffer) > len(self._left):
            raise ConnectError(f"the body ended {len(buffer) - len(self._left)} bytes early")
        buffer[:] = self._left[: len(buffer)]
        self._left = self._left[len(buffer) :]

    @classmethod
    def of(cls, reply: Reply) -> MemoryBody:
        """What a client gets of a server's reply."""
        return cls(reply.content_type, b"".join(reply.parts))


class WatchedBody:
    """A body that calls a function before its first byte is read."""

    def __init__(self, body: IncomingBody, before: Callable[[], None]) -> None:
        self.content_type = body.content_type
        self.length = body.length
        self.deadline = body.deadline
        self._body = body
        self._before: Callable[[], None] | None = before

    def readinto(self, buffer: memoryview) -> None:
        """Fill the buffer."""
        before, self._before = self._before, None
        if before is not None:
            before()
        self._body.readinto(buffer)


class ScatteringSink:
    """A sink that spreads the rows of every tensor over one of three times as many, in runs of one and of two."""

    def __init__(self) -> None:
        self.stores: dict[str, RowStore] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the scattering store."""
        self.stores[name] = scattered_store(
            3 * shape[0] + 1,
            shape,
            dtype,
            scattered_positions(shape[0]),
            lambda size, kind: torch.empty(tuple(size), dtype=kind),
        )
        return self.stores[name]

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Scatter a whole tensor."""
        self.allocate(name, rows.shape, rows.dtype).write(0, rows.cpu())


def scattered_positions(rows: int) -> torch.Tensor:
    """Ascending slots for rows: 1 2 5 7 8 11 13 14 17 ..."""
    numbers = torch.arange(rows)
    return 6 * (numbers // 3) + torch.tensor([1, 2, 5])[numbers % 3] if rows else numbers


@dataclass(slots=True)
class MemoryControl:
    """Opens channels on an endpoint of this process; what is said goes through JSON, as it does over HTTP."""

    endpoint: ServerEndpoint
    address: str = "127.0.0.1"
    reached_at: str = "127.0.0.1"
    is_private: bool = False
    device: str = "cpu"
    target_device: str = "cpu"
    accepted: list[ServerChannel] = field(default_factory=list)

    def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the endpoint accept."""
        channel, answer = self.endpoint.accept(_through_json(hello), reached_at=self.reached_at)
        self.accepted.append(channel)
        return _through_json(answer)

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:  # noqa: ARG002
        """Have the channel answer."""
        return _through_json(self.accepted[0].answer(_through_json(message)))


def _through_json(content: Mapping[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(dict(content)))
    return parsed


class ChannelPair:
    """The two ends of one channel, joined without HTTP."""

    def __init__(
        self, transport: type[Transport], endpoint: ServerEndpoint, options: Mapping[str, Any], *, device: str = "cpu"
    ) -> None:
        control = MemoryControl(endpoint, device=device, target_device=device)
        checked = build_model(transport.options_model, options, f"options of transport {transport.name!r}")
        offer = json.loads(json.dumps(endpoint.offer()))
        self.client: ClientChannel = transport.connect(checked, offer, control)
        if transport.connectionless:
            control.open_channel({})
        if len(control.accepted) != 1:
            raise AssertionError(f"{transport.name} opened {len(control.accepted)} channels, one is expected")
        self.server: ServerChannel = control.accepted[0]

    def transfer(
        self, transfer_id: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Send and receive once."""
        received = PackedTensors()
        reply = self.server.send(transfer_id, tensors, metadata or {})
        back = self.client.receive(MemoryBody.of(reply), received)
        return received, back

    def close(self) -> None:
        """Close both ends."""
        self.client.close()
        self.server.close()


class ServerClient:
    """A client of a real server that lets a test stand between the body and the channel."""

    def __init__(self, url: str, transport: type[Transport], options: Mapping[str, Any], *, timeout: float) -> None:
        self._connection = ServerConnection(url, timeout=timeout, max_connections=2)
        self._name = transport.name
        self._next_id = iter(range(1 << 30))
        self._lock = threading.Lock()
        handshake = messages.read_handshake(self._connection.request_json("GET", messages.TARGET))
        checked = build_model(transport.options_model, options, f"options of transport {transport.name!r}")
        self._lease = Lease(self._connection)
        self._control = ChannelControl(
            self._connection, transport.name, self._lease, device="cpu", target_device=handshake.target.device
        )
        self.channel = transport.connect(checked, handshake.transports[transport.name], self._control)

    def ask(self, request: SupervisionRequest) -> ResponseBody:
        """Ask for supervision and return the answer's body, unread."""
        with self._lock:
            headers = {messages.REQUEST_ID: f"test-{next(self._next_id)}", messages.TRANSPORT: self._name}
        if self._control.channel_id is not None:
            headers[messages.CHANNEL] = self._control.channel_id
        return self._connection.request("POST", messages.SUPERVISION, messages.encode_request(request), headers)

    def receive(self, body: IncomingBody, sink: Sink) -> dict[str, str]:
        """Receive a transfer."""
        return self.channel.receive(body, sink)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.channel.close()
        self._control.give_up()
        self._lease.end()
        self._connection.close()


def random_tensor(shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    """Random bits of a dtype: NaNs, infinities and subnormals, too."""
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=draw).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=draw, dtype=torch.uint8)
    return raw.view(dtype).view(tuple(shape))
