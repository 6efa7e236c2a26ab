"""Checks that a body came as it was sent."""

from __future__ import annotations

import xxhash

from eagle_target import protocol
from eagle_target.errors import ProtocolError


class Checksum:
    """The checksum of a body as it is read; nothing at all where none was asked for."""

    def __init__(self, is_wanted: bool) -> None:
        self._state = xxhash.xxh3_64() if is_wanted else None

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        if self._state is not None:
            self._state.update(data)

    def check(self, url: str, announced: str | None, left: int) -> None:
        """Compare with what the server at `url` announced; `left` bytes of the body were not read.

        Raises:
            ProtocolError: they differ, none was announced, or something is left.
        """
        if self._state is None:
            return
        if left:
            raise ProtocolError(f"{url} sent {left} bytes more than the transfer has")
        expected = f"{protocol.CHECKSUM_NAME}={self._state.hexdigest()}"
        if announced != expected:
            raise ProtocolError(
                f"{url} announced checksum {announced!r}, the body that came has {expected!r}: it changed on its way"
            )
