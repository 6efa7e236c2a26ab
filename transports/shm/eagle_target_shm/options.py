"""Options of transport `shm`."""

from __future__ import annotations

from pydantic import Field

from eagle_target.plugins.options import PluginOptions


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
