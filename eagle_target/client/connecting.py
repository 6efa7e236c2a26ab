"""Connecting to servers: wait while they load, and check that they serve the same."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from eagle_target.errors import ConnectError, ContractError, TransferTimeout, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.client.peer import Peer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
REPORT_SECONDS = 10.0
HOPELESS_PROBLEMS = ("failed", "closed")


def wait_for_handshakes(peers: Sequence[Peer], ready_timeout: float) -> None:
    """Shake hands with every server, waiting for those that are loading or not up yet.

    On a terminal a line says what is waited for; elsewhere the log does, every ten seconds.

    Raises:
        ConnectError: a server is not ready in time, with the last reason, or it failed to load.
    """
    started = reported = time.monotonic()
    waiting = list(peers)
    with_line = sys.stderr.isatty()
    while waiting:
        reasons: dict[str, str] = {}
        for peer in list(waiting):
            try:
                peer.shake_hands()
                waiting.remove(peer)
            except (ConnectError, TransferTimeout, Unavailable) as error:
                if isinstance(error, Unavailable) and error.problem in HOPELESS_PROBLEMS:
                    raise ConnectError(f"cannot use {peer.url}: {error}") from error
                reasons[peer.url] = str(error)
        waited = time.monotonic() - started
        if waiting and waited >= ready_timeout:
            raise ConnectError(f"not ready after {ready_timeout:g} s: " + "; ".join(reasons.values()))
        if waiting:
            if with_line:
                sys.stderr.write(f"\r\033[Kwaiting for {', '.join(reasons)} ({waited:.0f} s)")
                sys.stderr.flush()
            elif time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("waiting for %s", "; ".join(reasons.values()))
            time.sleep(min(POLL_SECONDS, ready_timeout))
    if with_line:
        sys.stderr.write("\r\033[K")


def check_agreement(peers: Sequence[Peer], encoding: str) -> None:
    """Refuse servers whose supervision would differ.

    Raises:
        ContractError: names the two servers and each field that differs, or the encoding one cannot give.
    """
    first = peers[0]
    for peer in peers:
        differences = first.handshake.served.differences(peer.handshake.served)
        if differences:
            raise ContractError(f"{first.url} and {peer.url} serve different targets: {'; '.join(differences)}")
        if encoding not in peer.handshake.encodings:
            raise ContractError(
                f"{peer.url} cannot answer in encoding {encoding!r}: use one of {list(peer.handshake.encodings)}"
            )
