"""Shared memory between a server and the clients on its host."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

from eagle_target.plugins.transport import ClientChannel, ServerEndpoint, Transport
from eagle_target_shm.options import ShmOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.transport import ControlPlane


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
