"""Clients of transport `nccl` in processes of their own, moments of a transfer, and the connection that carries it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from typing import TYPE_CHECKING, Any, Literal

import psutil
import pytest
import torch
from eagle_target_nccl.groups import PairGroup

from eagle_target.client.remote import RemoteEagle3TargetModel
from tests.faults.processes import CONTEXT, ServerUnderFault
from tests.server.cases import wait_until

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SOON_SECONDS = 30.0
# Less than one answer in each of 20 rounds.
SLACK_BYTES = 150 << 20
# Of the 5 messages that carry one batch.
HALF_WAY = 2
# Logits of 128 tokens, of which a server with a vocabulary of 20 000 makes 10 MB.
ROWS = {name: torch.ones(4, 32, dtype=torch.int64) for name in ("input_ids", "attention_mask", "loss_mask")}
# The store's, of the server with itself.
KEPT_CONNECTIONS = 2
# The system call that takes a file of another process; Python has no function for it.
PIDFD_GETFD = 438
# That HTTP may have started for several clients at a time; fewer than a leak in each of 20 rounds would leave.
HTTP_THREADS = 12


def client(*urls: str, **options: Any) -> RemoteEagle3TargetModel:
    usual = {"transport": "nccl", "timeout": SOON_SECONDS, "ready_timeout": SOON_SECONDS, "retry_timeout": 0.0}
    options = {**usual, **options}
    return RemoteEagle3TargetModel.from_urls(urls, encoding="logits", **options)


@contextlib.contextmanager
def halfway(action: Callable[[], object], *, after: int = HALF_WAY) -> Iterator[None]:
    """Do something once, when half (or `after`) of the messages this process receives next are asked for."""
    receive, asked = PairGroup._receive, iter(range(1 << 30))

    def count(self: PairGroup, message: torch.Tensor, number: int, kind: int) -> Any:
        # Transfer 0 is a greeting; a server of this process receives nothing else.
        if number and next(asked) == after:
            action()
        return receive(self, message, number, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairGroup, "_receive", count)
        yield


def _run_client(url: str, moment: str, parent: Connection) -> None:
    def pause() -> None:
        parent.send("here")
        parent.recv()

    torch.set_num_threads(1)
    with client(url) as target:
        if moment == "before":
            pause()
        with halfway(pause if moment == "during" else lambda: None):
            batch = target.generate_batch(**ROWS)
        if moment == "after":
            pause()
        parent.send(total_of(batch.logits))


def total_of(logits: torch.Tensor | None) -> float:
    assert logits is not None
    return float(logits.double().sum())


class ClientProcess:
    """A trainer that has come to a moment of its first transfer, and waits there to be told to go on."""

    def __init__(self, url: str, moment: str) -> None:
        self._pipe, child = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_run_client, args=(url, moment, child), daemon=True)
        self._process.start()
        child.close()
        assert self.hear() == "here"

    def hear(self) -> Any:
        assert self._pipe.poll(SOON_SECONDS), "nothing was heard of the client"
        return self._pipe.recv()

    def go_on(self) -> None:
        self._pipe.send("go on")

    def signal(self, number: signal.Signals) -> None:
        os.kill(int(self._process.pid or 0), number)

    def end(self) -> None:
        self._process.join(SOON_SECONDS)
        self._process.close()
        self._pipe.close()


class Footprint:
    """What a server holds, to be no more when its clients are gone."""

    def __init__(self, server: ServerUnderFault) -> None:
        self._server = server
        self._process = psutil.Process(server.process.pid)
        for _ in range(3):
            with client(server.url) as target:
                target.generate_batch(**ROWS)
        wait_until(lambda: server.connections() == KEPT_CONNECTIONS, "the end of earlier connections")
        self._before = self._now()
        self._rss = server.rss()

    def _now(self) -> tuple[int, int]:
        return self._process.num_threads(), self._process.num_fds()

    def check(self) -> None:
        threads, fds = self._before
        wait_until(lambda: self._now()[0] <= threads + HTTP_THREADS, f"not many more than {threads} threads")
        wait_until(lambda: self._now()[1] <= fds, f"no more than {fds} open files")
        wait_until(lambda: self._server.rss() < self._rss + SLACK_BYTES, "the memory of what was not received")


def group_connections(*other_ports: int) -> set[int]:
    """Files of this process that are connections with anything but these ports: the groups'."""
    held = psutil.Process().net_connections("tcp")
    return {
        connection.fd
        for connection in held
        if connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port not in other_ports
    }


def cut(fd: int, how: Literal["reset", "close"], server: ServerUnderFault) -> None:
    """Cut a connection of this process with a server, under the library that owns it: reset by the server, or closed.

    A proxy is not to be had in between: a group's ends tell each other in their store where they listen.
    """
    with socket.socket(fileno=os.dup(fd)) as connection:
        if how == "close":
            connection.shutdown(socket.SHUT_RDWR)
            return
        port = connection.getsockname()[1]
    held = psutil.Process(server.process.pid).net_connections("tcp")
    (theirs,) = (each.fd for each in held if each.raddr and each.raddr.port == port)
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(int(server.process.pid or 0))
    taken = libc.syscall(PIDFD_GETFD, process, theirs, 0)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    unspecified_address = bytes(16)
    assert libc.connect(taken, unspecified_address, len(unspecified_address)) == 0
    os.close(taken)
    os.close(process)
