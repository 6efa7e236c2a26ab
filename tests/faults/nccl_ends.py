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
from eagle_target_nccl.groups import TcpGroup

from eagle_target.client.remote import RemoteEagle3TargetModel
from tests.faults.processes import ROWS, PausedTrainer, ServerUnderFault, take_batch
from tests.server.cases import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SOON_SECONDS = 30.0
# Less than one answer in each of 20 rounds.
SLACK_BYTES = 150 << 20
# More than the two ends prove to each other before the first batch, and so early in its 10 MB that what is left is more
# than the sockets of both ends hold.
MIDST = 1 << 16
# The system call that takes a file of another process; Python has no function for it.
PIDFD_GETFD = 438
# That HTTP may have started for several clients at a time; fewer than a leak in each of 20 rounds would leave.
HTTP_THREADS = 12


def client(*urls: str, **options: Any) -> RemoteEagle3TargetModel:
    usual = {"transport": "nccl", "timeout": SOON_SECONDS, "ready_timeout": SOON_SECONDS, "retry_timeout": 0.0}
    options = {**usual, **options}
    return RemoteEagle3TargetModel.from_urls(urls, encoding="logits", **options)


@contextlib.contextmanager
def in_the_midst(action: Callable[[], object]) -> Iterator[None]:
    """Do something once, in the midst of the next batch that this process receives."""
    read, received, actions = TcpGroup._read, 0, [action]

    def read_piece(self: TcpGroup, piece: memoryview) -> int:
        nonlocal received
        if received >= MIDST and actions:
            actions.pop()()
        count = read(self, piece)
        received += count
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TcpGroup, "_read", read_piece)
        yield


def _train(url: str, moment: str, parent: Connection) -> None:
    torch.set_num_threads(1)
    with client(url) as target:
        take_batch(target, moment, parent, in_the_midst)


def trainer_at(moment: str, url: str) -> PausedTrainer:
    """A trainer that has come to a moment of its first transfer."""
    return PausedTrainer(_train, url, moment)


class Footprint:
    """What a server holds, to be no more when its clients are gone."""

    def __init__(self, server: ServerUnderFault) -> None:
        self._server = server
        self._process = psutil.Process(server.process.pid)
        for _ in range(3):
            with client(server.url) as target:
                target.generate_batch(**ROWS)
        wait_until(lambda: server.connections() == 0, "the end of earlier connections")
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

    A proxy in between would have to know the port, which a client is told for each group.
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
