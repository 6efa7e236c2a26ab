"""Shared memory between a server and the clients on its host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from eagle_target.plugins.options import PluginOptions
from eagle_target.plugins.transport import ClientChannel, ServerEndpoint, Transport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.plugins.transport import ControlPlane


class ShmOptions(PluginOptions):
    """Options of the server's end; a client needs none."""

    max_bytes: int = Field(
        default=4 << 30,
        ge=1 << 16,
        description="Shared memory a client may have, in bytes. It is taken as it is used, and kept until the client "
        "goes.",
    )
    max_total_bytes: int = Field(
        default=32 << 30,
        ge=1 << 16,
        description="Shared memory of all clients, in bytes; who would pass it is refused.",
    )
    cuda_bytes: int = Field(
        default=1 << 30,
        ge=1 << 16,
        description="Device memory a client may have, in bytes, where target and client have GPUs. It is taken when "
        "the client comes, and kept for the next one.",
    )
    send_timeout: float = Field(
        default=30.0, gt=0, description="Seconds an answer waits for the client to let go of earlier ones."
    )
    take_timeout: float = Field(
        default=10.0, gt=0, description="Seconds after which the memory of an answer that was never fetched is reused."
    )


class ShmTransport(Transport):
    """Tensors in memory that the client maps; of a target on a GPU, in the GPU's memory by CUDA IPC."""

    name: ClassVar[str] = "shm"
    options_model: ClassVar[type[PluginOptions]] = ShmOptions
    rank: ClassVar[int] = 80

    @classmethod
    def unusable_reason(cls) -> str | None:
        """Why memory cannot be shared on this machine."""
        if sys.platform != "linux" or sys.maxsize < 1 << 40:
            return f"it needs 64-bit Linux, this is {sys.platform}: use transport 'wire'"
        from eagle_target_shm.hosts import missing_file

        missing = missing_file()
        return None if missing is None else f"it needs {missing}, which cannot be read here: use transport 'wire'"

    @classmethod
    def listen(cls, options: PluginOptions) -> ServerEndpoint:
        """Start the server's end."""
        from eagle_target_shm.server import ShmServerEndpoint

        return ShmServerEndpoint(ShmOptions.model_validate(options.model_dump()))

    @classmethod
    def connect(cls, options: PluginOptions, offer: Mapping[str, Any], control: ControlPlane) -> ClientChannel:  # noqa: ARG003
        """Start the client's end, if the server is on this host."""
        from eagle_target_shm.client import open_channel

        return open_channel(offer, control)
