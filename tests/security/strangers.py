"""Processes that are no client's: of another user, and of another host, which is a network namespace of this one."""

from __future__ import annotations

import contextlib
import ctypes
import encodings.idna  # noqa: F401 - which another user may not read any more when it is needed
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.faults.processes import CONTEXT
from tests.server.cases import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

NOBODY = 65534
CLONE_NEWNET = 0x4000_0000
NAMESPACES = Path("/var/run/netns")

needs_another_user = pytest.mark.skipif(os.geteuid() != 0, reason="only root may run a process as another user")


class OtherHost:
    """A host on a network of two.

    Attributes:
        name: of its network namespace. address: its own. gateway: this host's address on that network.
    """

    def __init__(self, name: str, address: str, gateway: str) -> None:
        self.name = name
        self.address = address
        self.gateway = gateway


@contextlib.contextmanager
def other_host() -> Iterator[OtherHost]:
    """Make a host and a network of it and this one, and take both away at the end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace is made by root, with `ip` of iproute2")
    name = f"stranger{secrets.token_hex(3)}"
    network = f"10.203.{secrets.randbelow(254) + 1}"
    host = OtherHost(name, f"{network}.2", f"{network}.1")
    here, there = f"et{name[-6:]}a", f"et{name[-6:]}b"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    try:
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        _ip("address", "add", f"{host.gateway}/24", "dev", here)
        _ip("link", "set", here, "up")
        _ip("-netns", name, "address", "add", f"{host.address}/24", "dev", there)
        _ip("-netns", name, "link", "set", there, "up")
        _ip("-netns", name, "link", "set", "lo", "up")
        yield host
    finally:
        # Takes the pair of devices with it.
        _ip("netns", "delete", name)


@contextlib.contextmanager
def stranger(
    act: Callable[..., None], *arguments: Any, user: int | None = NOBODY, host: OtherHost | None = None
) -> Iterator[Any]:
    """A process of another user, or on another host, that does `act(say, *arguments)`; gives what it says first.

    It is killed at the end of the block.
    """
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_act, args=(theirs, user, host and host.name, act, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE_SECONDS), "nothing was heard of a stranger's process"
        said = ours.recv()
        if isinstance(said, Exception):
            raise said
        yield said
    finally:
        process.kill()
        process.join()
        ours.close()


def as_stranger(act: Callable[..., None], *arguments: Any, **who: Any) -> Any:
    """What such a process says first."""
    with stranger(act, *arguments, **who) as said:
        return said


def _act(
    pipe: Connection, user: int | None, namespace: str | None, act: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    try:
        if namespace is not None:
            _enter(namespace)
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        act(pipe.send, *arguments)
    except Exception as error:  # noqa: BLE001 - raised again in the test
        pipe.send(error)


def _enter(namespace: str) -> None:
    descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)


def listening(process: int) -> set[tuple[str, int]]:
    """Addresses and ports that a process takes TCP connections at."""
    held = psutil.Process(process).net_connections("tcp")
    return {(str(each.laddr.ip), int(each.laddr.port)) for each in held if each.status == psutil.CONN_LISTEN}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
