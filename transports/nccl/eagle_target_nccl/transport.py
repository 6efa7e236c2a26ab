"""The transport: HTTP says what there is, a group of client and server carries it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, ClassVar, cast

from eagle_target.plugins.transport import ClientChannel, ServerEndpoint, Transport
from eagle_target_nccl.options import NcclOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.transport import ControlPlane


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
