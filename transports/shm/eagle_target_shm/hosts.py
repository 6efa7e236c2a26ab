"""Who shares memory with whom: the same user, on the same host, where one Unix socket reaches both."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NETWORK = Path("/proc/self/ns/net")


def this_host() -> dict[str, Any]:
    """What either end tells the other: a digest of this boot of the kernel, the network namespace, the user."""
    boot = BOOT_ID.read_text(encoding="ascii").strip()
    return {
        "host": hashlib.sha256(b"eagle-target/shm/" + boot.encode()).hexdigest()[:16],
        "network": NETWORK.stat().st_ino,
        "user": os.geteuid(),
    }


def missing_file() -> str | None:
    """What tells this host from others and cannot be read here, if anything."""
    return next((str(path) for path in (BOOT_ID, NETWORK) if not os.access(path, os.R_OK)), None)


def refusal(peer: Mapping[str, Any], whose: str) -> str | None:
    """Why no memory can be shared with a peer that told this; None where nothing speaks against it.

    Args:
        peer: what the peer's `this_host` gave. whose: `the server` or `the client`.
    """
    here = this_host()
    if peer.get("host") != here["host"]:
        return (
            f"{whose} runs on another host (boot {str(peer.get('host'))[:64]!r}, here {here['host']!r}): "
            "use transport 'nccl' or 'wire'"
        )
    if peer.get("network") != here["network"]:
        return (
            f"{whose} runs in another container (network namespace {str(peer.get('network'))[:64]}, here "
            f"{here['network']}): run both in one pod or on the host's network, or use transport 'nccl' or 'wire'"
        )
    if peer.get("user") != here["user"]:
        return (
            f"{whose} runs as user {str(peer.get('user'))[:64]}, this process as {here['user']}: memory is shared "
            "with the same user only, use transport 'wire'"
        )
    return None
