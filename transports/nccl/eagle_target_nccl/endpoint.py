"""The server's end: meets every client where that client's HTTP connection came in, and nowhere else."""

from __future__ import annotations

import ipaddress
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from eagle_target.devices import is_numbered
from eagle_target.errors import ConnectError
from eagle_target.plugins.transport import ServerChannel, ServerEndpoint
from eagle_target_nccl import interfaces
from eagle_target_nccl.gate import Gate
from eagle_target_nccl.meetings import NcclMeeting, TcpMeeting
from eagle_target_nccl.proofs import DIGESTS
from eagle_target_nccl.server_channel import NcclServerChannel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eagle_target_nccl.meetings import Meeting
    from eagle_target_nccl.options import NcclOptions


class NcclServerEndpoint(ServerEndpoint):
    """Takes clients, and gives each a key for each of its groups, over HTTP."""

    def __init__(self, options: NcclOptions) -> None:
        self._options = options
        self._gate = Gate(options.port)

    def offer(self) -> dict[str, Any]:
        """What can carry tensors here."""
        return {"backends": backends(), "torch": torch.__version__}

    def accept(self, hello: Mapping[str, Any], *, reached_at: str) -> tuple[ServerChannel, dict[str, Any]]:
        """Take a client; a group comes up when the client joins."""
        backend, device, digest = hello.get("backend"), str(hello.get("target_device")), hello.get("digest")
        if backend not in backends():
            raise ConnectError(f"this server cannot use {str(backend)[:64]!r}, only {backends()}")
        if digest not in DIGESTS:
            raise ConnectError(f"this server cannot use digest {str(digest)[:64]!r}, only {DIGESTS}")
        host = numeric_address(self._options.host or reached_at)
        timeout = self._options.connect_timeout
        arrange: Callable[[], Meeting]
        if backend == "nccl":
            if not is_numbered(torch.device(device)):
                raise ConnectError(f"the client names the target's device {device!r}, which has no number")
            reason = interfaces.refusal(host, "the server")
            if reason is not None:
                raise ConnectError(reason)
            if device_identity(device) == hello.get("gpu"):
                raise ConnectError("NCCL joins no two ends on one GPU: use transport 'shm', or other GPUs")
            arrange = partial(NcclMeeting, torch.device(device), digest, timeout)
        else:
            is_named = self._options.host is not None
            arrange = partial(TcpMeeting, self._gate, host, digest, timeout, is_named=is_named)
        return NcclServerChannel(self._options, arrange, torch.device(device if backend == "nccl" else "cpu")), {}

    def close(self) -> None:
        """Expect nobody any more."""
        self._gate.close()


def backends() -> list[str]:
    """What this machine has of TCP and NCCL."""
    return ["tcp", "nccl"] if torch.cuda.is_available() and distributed.is_nccl_available() else ["tcp"]


def device_identity(device: str) -> str:
    """What tells a GPU from every other, on this machine and elsewhere.

    Raises:
        ConnectError: there is no such device here.
    """
    try:
        return str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
        raise ConnectError(f"there is no GPU {device[:64]!r} here: {error}") from error


def numeric_address(host: str) -> str:
    """The first address of a host; IPv4 where it is IPv4 in IPv6's clothes.

    Raises:
        ConnectError: it has none.
    """
    try:
        text = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConnectError(f"{host!r} has no address: {error}") from error
    address = ipaddress.ip_address(text)
    if address.is_unspecified or address.is_multicast:
        raise ConnectError(f"{address} is not the address of a host")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return text if mapped is None else str(mapped)
