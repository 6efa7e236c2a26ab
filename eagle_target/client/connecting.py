"""Connecting to servers: wait while they load, and check that they serve the same."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Literal

from eagle_target.errors import ConnectError, ContractError, TransferTimeout, TransportRefused, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.client.peer import Peer
    from eagle_target.projection import Encoding

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
REPORT_SECONDS = 10.0
HOPELESS_PROBLEMS = ("failed", "closed")


def wait_for_handshakes(peers: Sequence[Peer], ready_timeout: float) -> None:
    """Shake hands with every server, waiting for those that are loading or not up yet.

    On a terminal a line says what is waited for; elsewhere the log does, every ten seconds.

    Raises:
        ConnectError: a server is not ready in time, with the last reason, or it failed to load.
        TransportRefused: a server is ready, but no transport asked for works with it.
    """
    started = time.monotonic()
    report = _Report(started)
    waiting = dict.fromkeys(peers, "")
    while waiting:
        asked = {peer: _reason_to_wait(peer) for peer in waiting}
        waiting = {peer: reason for peer, reason in asked.items() if reason is not None}
        if waiting and time.monotonic() - started >= ready_timeout:
            raise ConnectError(f"not ready after {ready_timeout:g} s: " + "; ".join(waiting.values()))
        if waiting:
            report.show(waiting)
            time.sleep(min(POLL_SECONDS, ready_timeout))
    report.clear()


def _reason_to_wait(peer: Peer) -> str | None:
    """Shake hands; why that has to be tried again, or None when it is done."""
    try:
        peer.shake_hands()
    except TransportRefused:
        raise
    except (ConnectError, TransferTimeout, Unavailable) as error:
        if isinstance(error, Unavailable) and error.problem in HOPELESS_PROBLEMS:
            raise ConnectError(f"cannot use {peer.url}: {error}") from error
        return str(error)
    return None


class _Report:
    """Says what is waited for: on a terminal in one line, elsewhere in the log."""

    def __init__(self, started: float) -> None:
        self._started = self._logged = started
        self._with_line = sys.stderr.isatty()

    def show(self, waiting: Mapping[Peer, str]) -> None:
        """Tell who is waited for, and in the log why."""
        now = time.monotonic()
        if self._with_line:
            names = ", ".join(peer.url for peer in waiting)
            sys.stderr.write(f"\r\033[Kwaiting for {names} ({now - self._started:.0f} s)")
            sys.stderr.flush()
        elif now - self._logged >= REPORT_SECONDS:
            self._logged = now
            logger.info("waiting for %s", "; ".join(waiting.values()))

    def clear(self) -> None:
        """Wipe the line."""
        if self._with_line:
            sys.stderr.write("\r\033[K")


def check_agreement(peers: Sequence[Peer], encoding: Encoding | Literal["auto"]) -> Encoding:
    """Refuse servers whose supervision would differ; returns the encoding to ask for.

    Raises:
        ContractError: names the two servers and each field that differs, or the encoding one cannot give.
    """
    first = peers[0]
    for peer in peers:
        differences = first.handshake.served.differences(peer.handshake.served)
        if differences:
            raise ContractError(f"{first.url} and {peer.url} serve different targets: {'; '.join(differences)}")
        if encoding != "auto" and encoding not in peer.handshake.encodings:
            raise ContractError(
                f"{peer.url} cannot answer in encoding {encoding!r}: use one of {list(peer.handshake.encodings)}"
            )
    if encoding != "auto":
        return encoding
    return "hidden" if all("hidden" in peer.handshake.encodings for peer in peers) else "probs"
