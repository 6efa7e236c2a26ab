"""Options of transport `nccl`."""

from __future__ import annotations

from pydantic import Field

from eagle_target.plugins.options import PluginOptions


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
