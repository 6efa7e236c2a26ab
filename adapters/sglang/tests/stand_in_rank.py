"""A rank without an engine, for tests of `RankGroup`: the real process, socket, lifeline and loop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from eagle_target_sglang.messages import SharedTensors, share
from eagle_target_sglang.rank import end_with_parent, serve_rank

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def handle(header: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], SharedTensors | None]:
    """Do as the header says."""
    command = header["command"]
    if command == "echo":
        return {"pid": os.getpid()}, share({name: tensor + 1 for name, tensor in tensors.items()})
    if command == "raise":
        raise ContractError("not like this")
    if command == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if command == "exit":
        sys.exit(3)
    if command == "wait":
        time.sleep(600.0)
    return {}, None


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    serve_rank(socket.socket(fileno=int(sys.argv[1])), handle)
