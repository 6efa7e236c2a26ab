"""The server's end: arranges a meeting for every client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from eagle_target.devices import is_numbered
from eagle_target.errors import ConnectError
from eagle_target.transports import ServerChannel, ServerEndpoint
from eagle_target_nccl.groups import SERVER, open_group
from eagle_target_nccl.rendezvous import MeetingPlace, checked_address, numeric_address
from eagle_target_nccl.server_channel import NcclServerChannel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target_nccl.groups import PairGroup
    from eagle_target_nccl.rendezvous import Meeting
    from eagle_target_nccl.transport import NcclOptions


class NcclServerEndpoint(ServerEndpoint):
    """Listens at addresses that clients reach this machine at, from the first client on."""

    def __init__(self, options: NcclOptions) -> None:
        self._options = options
        self._place = MeetingPlace(options.port, options.connect_timeout)

    def offer(self) -> dict[str, Any]:
        """What can carry tensors here."""
        return {"backends": backends(), "torch": torch.__version__}

    def accept(self, hello: Mapping[str, Any]) -> tuple[ServerChannel, dict[str, Any]]:
        """Listen where the client reaches this machine; the group comes up when the client joins."""
        backend, device = hello.get("backend"), str(hello.get("target_device"))
        if backend not in backends():
            raise ConnectError(f"this server cannot use {str(backend)[:64]!r}, only {backends()}")
        if backend == "nccl" and not is_numbered(torch.device(device)):
            raise ConnectError(f"the client names the target's device {device!r}, which has no number")
        if backend == "nccl" and device_identity(device) == hello.get("gpu"):
            raise ConnectError("NCCL joins no two ends on one GPU: use transport 'shm', or other GPUs")
        host = self._options.host
        address = checked_address(hello.get("address")) if host is None else numeric_address(host)
        self._place.listen(address)

        def open_this_end(meeting: Meeting) -> PairGroup:
            return open_group(
                meeting,
                SERVER,
                backend=backend,
                address=address,
                device=device,
                connect_timeout=self._options.connect_timeout,
            )

        channel = NcclServerChannel(
            self._options,
            arrange=lambda: self._place.arrange(address),
            open_this_end=open_this_end,
            forget=self._place.forget,
            device=torch.device(device if backend == "nccl" else "cpu"),
        )
        return channel, {}

    def close(self) -> None:
        """Close the stores."""
        self._place.close()


def backends() -> list[str]:
    """What this machine has of gloo and NCCL."""
    usable = ["gloo"] if distributed.is_gloo_available() else []
    return [*usable, "nccl"] if torch.cuda.is_available() and distributed.is_nccl_available() else usable


def device_identity(device: str) -> str:
    """What tells a GPU from every other, on this machine and elsewhere.

    Raises:
        ConnectError: there is no such device here.
    """
    try:
        return str(torch.cuda.get_device_properties(torch.device(device)).uuid)
    except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
        raise ConnectError(f"there is no GPU {device[:64]!r} here: {error}") from error
