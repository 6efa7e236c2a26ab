"""Connecting to servers: wait while they load, and check that they serve the same."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Literal

from eagle_target.errors import (
    ConfigError,
    ConnectError,
    ContractError,
    EagleTargetError,
    TransferTimeout,
    TransportRefused,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.client.session import ServerSession
    from eagle_target.contract.request import Encoding

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
REPORT_SECONDS = 10.0
HOPELESS_PROBLEMS = ("failed", "closed")


def connect_servers(
    sessions: Sequence[ServerSession],
    encoding: Encoding | Literal["auto"],
    *,
    ready_timeout: float,
    min_servers: int | None,
) -> tuple[Encoding, dict[ServerSession, EagleTargetError]]:
    """Shake hands with servers; returns the encoding to ask for, and why each server is left out that is.

    Those left out are used once they serve what the first of the others serves.

    Args:
        sessions: the servers. encoding: `auto` for the best that all can give.
        ready_timeout: seconds to wait. min_servers: how many must be ready and alike; None for all.

    Raises:
        ConfigError: `min_servers` is no number of these servers.
        ConnectError: too few are ready in time. ContractError: too few serve the same.
    """
    needed = len(sessions) if min_servers is None else min_servers
    if not 1 <= needed <= len(sessions):
        raise ConfigError(f"min_servers must be 1 to {len(sessions)}, got {min_servers}")
    left_out = wait_for_handshakes(sessions, ready_timeout, needed)
    ready = [session for session in sessions if session not in left_out]
    for session in ready[1:]:
        try:
            check_alike(ready[0], session)
        except ContractError as error:
            if len(sessions) - len(left_out) <= needed:
                raise
            left_out[session] = error
    chosen = choose_encoding([session for session in ready if session not in left_out], encoding)
    for session, reason in left_out.items():
        logger.warning("%s is left out for now: %s", session.url, reason)
        session.follow(ready[0].handshake)
    return chosen, left_out


def wait_for_handshakes(
    sessions: Sequence[ServerSession], ready_timeout: float, needed: int
) -> dict[ServerSession, EagleTargetError]:
    """Shake hands with servers until so many are ready, waiting for those that are loading or not up yet.

    On a terminal a line says what is waited for; elsewhere the log does, every ten seconds.

    Returns:
        why each of the others is not.

    Raises:
        ConnectError: too few are ready in time, with the last reasons, or one of all failed to load.
        TransportRefused: a server is ready, but no transport asked for works with it.
    """
    started = time.monotonic()
    report = _Report(started)
    waiting: dict[ServerSession, EagleTargetError] = {}
    remaining = list(sessions)
    while remaining:
        reasons = {session: _reason_to_wait(session, is_needed=needed == len(sessions)) for session in remaining}
        waiting = {session: reason for session, reason in reasons.items() if reason is not None}
        remaining = list(waiting)
        if len(sessions) - len(waiting) >= needed:
            break
        if time.monotonic() - started >= ready_timeout:
            raise ConnectError(f"not ready after {ready_timeout:g} s: " + "; ".join(map(str, waiting.values())))
        report.show(waiting)
        time.sleep(min(POLL_SECONDS, ready_timeout))
    report.clear()
    return waiting


def _reason_to_wait(session: ServerSession, *, is_needed: bool) -> EagleTargetError | None:
    """Shake hands; why that has to be tried again, or None when it is done. The hopeless is raised if it matters."""
    try:
        session.shake_hands()
    except EagleTargetError as error:
        if not is_needed:
            return error
        if isinstance(error, Unavailable) and error.problem in HOPELESS_PROBLEMS:
            raise ConnectError(f"cannot use {session.url}: {error}") from error
        if isinstance(error, TransportRefused) or not isinstance(error, ConnectError | TransferTimeout | Unavailable):
            raise
        return error
    return None


class _Report:
    """Says what is waited for: on a terminal in one line, elsewhere in the log."""

    def __init__(self, started: float) -> None:
        self._started = self._logged = started
        self._with_line = sys.stderr.isatty()

    def show(self, waiting: Mapping[ServerSession, EagleTargetError]) -> None:
        """Tell who is waited for, and in the log why."""
        now = time.monotonic()
        if self._with_line:
            names = ", ".join(session.url for session in waiting)
            sys.stderr.write(f"\r\033[Kwaiting for {names} ({now - self._started:.0f} s)")
            sys.stderr.flush()
        elif now - self._logged >= REPORT_SECONDS:
            self._logged = now
            logger.info("waiting for %s", "; ".join(map(str, waiting.values())))

    def clear(self) -> None:
        """Wipe the line."""
        if self._with_line:
            sys.stderr.write("\r\033[K")


def check_alike(first: ServerSession, other: ServerSession) -> None:
    """Refuse a server whose supervision would differ.

    Raises:
        ContractError: names the two servers and each field that differs.
    """
    differences = first.handshake.served.differences(other.handshake.served)
    if differences:
        raise ContractError(f"{first.url} and {other.url} serve different targets: {'; '.join(differences)}")


def choose_encoding(sessions: Sequence[ServerSession], encoding: Encoding | Literal["auto"]) -> Encoding:
    """The encoding to ask for: the one given, or the best that all servers can give.

    Raises:
        ContractError: names the server that cannot give it.
    """
    if encoding == "auto":
        return "hidden" if all("hidden" in session.handshake.encodings for session in sessions) else "probs"
    for session in sessions:
        if encoding not in session.handshake.encodings:
            raise ContractError(
                f"{session.url} cannot answer in encoding {encoding!r}: use one of {list(session.handshake.encodings)}"
            )
    return encoding
