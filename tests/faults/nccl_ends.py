"""Clients of transport `nccl` in processes of their own, and the connection that carries a transfer, held midway."""

from __future__ import annotations

import contextlib
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from eagle_target_nccl import client_channel

from eagle_target.client.remote import RemoteEagle3TargetModel
from tests.faults.processes import ROWS, PausedTrainer, ServerUnderFault, take_batch
from tests.faults.proxy import Armed, Fault, Proxy
from tests.server.cases import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

SOON_SECONDS = 30.0
# Less than one answer in each of 20 rounds.
SLACK_BYTES = 150 << 20
# Of the 10 MB of a batch, and more than the two ends prove to each other before the first.
MIDST = 1 << 16
# That HTTP may have started for several clients at a time; fewer than a leak in each of 20 rounds would leave.
HTTP_THREADS = 12


def client(*urls: str, **options: Any) -> RemoteEagle3TargetModel:
    usual = {"transport": "nccl", "timeout": SOON_SECONDS, "ready_timeout": SOON_SECONDS, "retry_timeout": 0.0}
    options = {**usual, **options}
    return RemoteEagle3TargetModel.from_urls(urls, encoding="logits", **options)


class Groups:
    """Leads each connection of a group that this process opens through a proxy of its own.

    A client is told the port for each group, so what it connects with is exchanged.
    """

    def __init__(self) -> None:
        self._proxies: list[Proxy] = []
        self._armed: Armed | None = None

    def connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        proxy = Proxy("http://{}:{}".format(*address))
        proxy.armed = self._armed
        self._proxies.append(proxy)
        return socket.create_connection(proxy.address, timeout)

    @contextlib.contextmanager
    def in_the_midst(
        self, action: Callable[[], object] = bool, then: Fault = "pass", *, after: int = MIDST
    ) -> Iterator[Armed]:
        """Do something once, in the midst of the next batch that comes; then a connection goes on, or does not.

        While it is done, and longer with `hold`, there is no more of the batch anywhere that the client can reach.
        """
        armed = Armed(then, after, first=action)
        self._arm(armed)
        yield armed
        assert armed.left <= 0, "no batch came as far as its midst"
        self._arm(None)

    def _arm(self, armed: Armed | None) -> None:
        self._armed = armed
        for proxy in self._proxies:
            proxy.armed = armed

    def release(self) -> None:
        """Let what was held go on, and hold no more."""
        for proxy in self._proxies:
            proxy.released.set()

    def close(self) -> None:
        for proxy in self._proxies:
            proxy.close()


@contextlib.contextmanager
def proxied_groups() -> Iterator[Groups]:
    groups = Groups()
    with pytest.MonkeyPatch.context() as patch:
        given = SimpleNamespace(**{**vars(socket), "create_connection": groups.connect})
        patch.setattr(client_channel, "socket", given)
        try:
            yield groups
        finally:
            groups.close()


def _train(url: str, moment: str, parent: Connection) -> None:
    torch.set_num_threads(1)
    with proxied_groups() as groups, client(url) as target:
        take_batch(target, moment, parent, groups.in_the_midst)


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
