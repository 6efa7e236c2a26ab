"""The process of one rank: `python -m eagle_target_sglang.rank SOCKET LIFELINE`, started by `RankGroup`."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from eagle_target.errors import EagleTargetError
from eagle_target_sglang.messages import receive_message, send_message

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from eagle_target_sglang.messages import SharedTensors

    Handler = Callable[[dict[str, Any], dict[str, torch.Tensor]], tuple[dict[str, Any], SharedTensors | None]]


def serve_rank(peer: socket.socket, handle: Handler) -> None:
    """Answer messages until one says close or the peer is gone; what a handler raises is an answer, too."""
    while (message := receive_message(peer)) is not None:
        header, tensors = message
        if header.get("command") == "close":
            return
        try:
            answer, shared = handle(header, tensors)
        except Exception as error:  # noqa: BLE001 - raised again on the other side
            kind = type(error).__name__ if isinstance(error, EagleTargetError) else "AdapterError"
            text = str(error) if isinstance(error, EagleTargetError) else f"{type(error).__name__}: {error}"
            answer, shared = {"error": kind, "message": text}, None
        tensors.clear()
        send_message(peer, answer, shared)


def end_with_parent(lifeline: int) -> None:
    """End this process when the write end of a pipe is gone, even in the middle of a collective."""

    def wait() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def run_rank(peer_descriptor: int, lifeline: int) -> None:
    """Serve one rank of the engine, and end this process."""
    peer = socket.socket(fileno=peer_descriptor)
    end_with_parent(lifeline)
    from eagle_target_sglang.rank_commands import RankCommands

    try:
        serve_rank(peer, RankCommands().handle)
    finally:
        # Destructors of process groups and kernels may hang where a peer rank is gone.
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]))
