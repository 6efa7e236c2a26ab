"""Ranks forked from a process that has imported SGLang once: the same code as `python -m`, seconds sooner."""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Self

from eagle_target_sglang.ranks import start_process

PRELOADED = ("eagle_target_sglang.rank_commands", "sglang.srt.models.registry", "transformers")


class ForkedProcess:
    """What `RankGroup` uses of a Popen, for a process that is not this one's child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """0 once it has ended: only its parent knows the status."""
        if self.returncode is None and select.select([self._descriptor], [], [], 0)[0]:
            self.returncode = 0
            os.close(self._descriptor)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (60.0 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 60.0)
            time.sleep(0.01)
        return 0

    def kill(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


class WarmRanks:
    """The process that ranks are forked from, until the end of the block."""

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=2)
        theirs.close()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def start(self, module: str, peer: int, lifeline: int) -> ForkedProcess | subprocess.Popen[bytes]:
        """Stand in for `ranks.start_process`; ranks that need no SGLang start as ever."""
        if module != "eagle_target_sglang.rank":
            return start_process(module, peer, lifeline)
        given = {name: value for name, value in os.environ.items() if name.startswith("SGLANG_")}
        socket.send_fds(self._socket, [json.dumps(given).encode()], [peer, lifeline])
        received = self._socket.recv(8)
        assert len(received) == 8, "the process that ranks are forked from has ended"
        return ForkedProcess(int.from_bytes(received, "little"))


def main() -> None:
    """Import SGLang, then fork a rank for every two descriptors that come."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        given, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 2)
        if not descriptors:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            os.environ.update(json.loads(given))
            from eagle_target_sglang.rank import run_rank

            run_rank(*array.array("i", descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(pid.to_bytes(8, "little"))


if __name__ == "__main__":
    main()
