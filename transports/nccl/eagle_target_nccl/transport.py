"""The transport: HTTP says what there is, a group of client and server carries it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from eagle_target.plugins.options import PluginOptions
from eagle_target.plugins.transport import ClientChannel, ServerEndpoint, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.plugins.transport import ControlPlane


class NcclOptions(PluginOptions):
    """Options of either end."""

    host: str | None = Field(
        default=None,
        description="Server: address of its machine at which clients connect for tensors, and which they are told; "
        "default the one at which their HTTP connection came in.",
    )
    port: int = Field(
        default=0, ge=0, le=65535, description="Server: port at which clients connect for tensors; 0 picks a free one."
    )
    connect_timeout: float = Field(default=10.0, gt=0, description="Seconds a group may take to come up.")
    transfer_timeout: float = Field(
        default=60.0,
        gt=0,
        description="Server: seconds a client may take to receive, and supervision waits to be asked for.",
    )
    idle_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Server: seconds after which a group that carries nothing is given up; the next request opens one.",
    )
    outbox_bytes: int = Field(
        default=4 << 30, ge=1, description="Server: bytes that may wait for one client; it is answered 503 above that."
    )


class NcclTransport(Transport):
    """A group of two for each client: NCCL where both ends have CUDA, else a TCP connection. Experimental."""

    name: ClassVar[str] = "nccl"
    options_model: ClassVar[type[PluginOptions]] = NcclOptions
    rank: ClassVar[int] = 60

    @classmethod
    def version(cls) -> str | None:
        """torch's: it brings NCCL."""
        try:
            return version("torch")
        except PackageNotFoundError:
            return None

    @classmethod
    def auto_refusal(cls, control: ControlPlane) -> str | None:
        """It is experimental between CUDA devices, and between CPUs no better than `shm` and `wire`."""
        return (
            f"batches go to {control.device!r} and the target runs on {control.target_device!r}: nccl is experimental, "
            "and taken when it is asked for by name"
        )

    @classmethod
    def listen(cls, options: PluginOptions) -> ServerEndpoint:
        """Start the server's end."""
        from eagle_target_nccl.endpoint import NcclServerEndpoint

        return NcclServerEndpoint(cast("NcclOptions", options))

    @classmethod
    def connect(cls, options: PluginOptions, offer: Mapping[str, Any], control: ControlPlane) -> ClientChannel:
        """Join a group with one server.

        Raises:
            ConnectError: the two ends cannot, with the reason.
        """
        from eagle_target_nccl.client_channel import open_client_channel

        return open_client_channel(cast("NcclOptions", options), offer, control)
