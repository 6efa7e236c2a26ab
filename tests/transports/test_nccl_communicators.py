"""The NCCL half of transport `nccl` with a stand-in for torch's group: how its id travels, and where it may listen."""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from eagle_target_nccl import interfaces
from eagle_target_nccl.groups import SERVER, UNIQUE_ID_BYTES, UNIQUE_ID_KEY
from eagle_target_nccl.transport import NcclTransport
from torch import distributed

from eagle_target.errors import ConnectError, TransportError
from eagle_target.plugins.options import build_model
from eagle_target.seals import KEY_BYTES
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.transport_harness import ChannelPair, MemoryControl

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.plugins.transport import ServerEndpoint

Channel = tuple[bytes, int]
POLL_SECONDS = 0.05


class Work:
    """What a stand-in's message is waited for by."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over

    def is_completed(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        assert self._over.is_set()


class StandIn:
    """As `ProcessGroupNCCL` does: rank 0 leaves an id in its store at the first message, rank 1 looks for it in its."""

    messages: ClassVar[defaultdict[Channel, queue.SimpleQueue[torch.Tensor]]] = defaultdict(queue.SimpleQueue)

    class Options:
        def __init__(self) -> None:
            self.config = type("Config", (), {"blocking": 1})()
            self._timeout = None

    def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
        assert (size, options.config.blocking) == (2, 0)
        self._store = store
        self._rank = rank
        self._id: bytes | None = None
        # One message after another, as on a device.
        self._stream = ThreadPoolExecutor(1)
        self._aborted = threading.Event()

    def send(self, messages: list[torch.Tensor], peer: int, tag: int) -> Work:
        assert (peer, tag) == (1 - self._rank, 0)
        self.messages[self._find_id(), peer].put(messages[0].clone())
        over = threading.Event()
        over.set()
        return Work(over)

    def recv(self, messages: list[torch.Tensor], peer: int, tag: int) -> Work:
        assert (peer, tag) == (1 - self._rank, 0)
        ours, over = self.messages[self._find_id(), self._rank], threading.Event()
        self._stream.submit(self._receive, ours, messages[0], over)
        return Work(over)

    def abort(self) -> None:
        self._aborted.set()
        self._stream.shutdown(wait=False, cancel_futures=True)

    def _receive(self, ours: queue.SimpleQueue[torch.Tensor], message: torch.Tensor, over: threading.Event) -> None:
        while not self._aborted.is_set():
            with contextlib.suppress(queue.Empty):
                message.copy_(ours.get(timeout=POLL_SECONDS))
                over.set()
                return

    def _find_id(self) -> bytes:
        if self._id is None and self._rank == SERVER:
            self._id = secrets.token_bytes(UNIQUE_ID_BYTES)
            self._store.set(UNIQUE_ID_KEY, self._id)
        return self._id or bytes(self._store.get(UNIQUE_ID_KEY))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerEndpoint]:
    """A server on a machine whose GPUs are its CPU."""
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", StandIn, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    gpus = iter(("one", "other"))
    for module in ("client_channel", "endpoint"):
        monkeypatch.setattr(f"eagle_target_nccl.{module}.backends", lambda: ["tcp", "nccl"])
        monkeypatch.setattr(f"eagle_target_nccl.{module}.device_identity", lambda _: next(gpus))
    monkeypatch.setattr("eagle_target_nccl.client_channel.backend_between", lambda *_: "nccl")
    monkeypatch.setenv(interfaces.SETTING, "=lo")
    made = NcclTransport.listen(build_model(NcclTransport.options_model, {}, "options"))
    yield made
    made.close()


@dataclass(slots=True)
class LyingControl(MemoryControl):
    """Tells the client something else than the server does."""

    lie: dict[str, Any] = field(default_factory=dict)

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        return {**MemoryControl.tell(self, message, timeout=timeout), **self.lie}


def test_the_id_comes_over_http_with_a_key_and_tensors_go_through_the_group(endpoint: ServerEndpoint) -> None:
    tensors = {"rows": torch.arange(1 << 20), "small": torch.ones(3)}
    pair = ChannelPair(NcclTransport, endpoint, {})
    for number in range(3):
        assert_same_bits(pair.transfer(f"t{number}", tensors)[0], tensors)
    pair.close()


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"key": "00" * KEY_BYTES}, "no group with the server"),
        ({"id": "00"}, "an id of 1 bytes"),
        ({"id": None}, "describes no group"),
        ({"key": "00"}, "describes no group"),
    ],
    ids=str,
)
def test_an_answer_that_does_not_fit_is_refused(endpoint: ServerEndpoint, lie: dict[str, Any], reason: str) -> None:
    control = LyingControl(endpoint, lie=lie)
    with pytest.raises(TransportError, match=reason):
        NcclTransport.connect(
            build_model(NcclTransport.options_model, {"connect_timeout": 1.0}, "options"), endpoint.offer(), control
        )
    control.accepted[0].close()


@pytest.mark.parametrize(
    ("setting", "name", "expected"),
    [
        ("eth", "eth0", True),
        ("eth", "lo", False),
        ("=eth0", "eth0", True),
        ("=eth0", "eth01", False),
        ("ib,eth1", "eth1", True),
        ("^docker,lo", "eth0", True),
        ("^docker,lo", "docker0", False),
        ("^=eth0", "eth0", False),
        ("^=eth0", "eth01", True),
        ("=", "eth0", False),
    ],
)
def test_which_interfaces_nccl_may_use(setting: str, name: str, expected: bool) -> None:
    assert interfaces.is_allowed(name, setting) == expected


@pytest.mark.parametrize("setting", [None, "", "^docker", "=nothing"])
def test_nccl_is_refused_where_it_might_listen_elsewhere(
    endpoint: ServerEndpoint, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    if setting is None:
        monkeypatch.delenv(interfaces.SETTING)
    else:
        monkeypatch.setenv(interfaces.SETTING, setting)
    if setting == "^docker":
        monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    hello = {"backend": "nccl", "target_device": "cuda:0", "digest": "sha256", "gpu": "x"}
    with pytest.raises(ConnectError, match=r"would listen elsewhere than at .*, where the server is reached"):
        endpoint.accept(hello, reached_at="127.0.0.1")
    with pytest.raises(ConnectError, match="Set it to the interface with that address, =lo"):
        NcclTransport.connect(NcclTransport.options_model(), endpoint.offer(), MemoryControl(endpoint))


def test_the_address_of_an_interface_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interfaces.SETTING, "=lo")
    assert interfaces.refusal("127.0.0.1", "the server") is None
    assert interfaces.refusal("127.8.9.10", "the server") is None
    assert "there is none on this machine" in (interfaces.refusal("192.0.2.1", "the server") or "")
