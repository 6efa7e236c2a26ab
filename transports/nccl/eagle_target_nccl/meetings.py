"""How the two ends of one group find each other: all that the client needs to know comes to it over HTTP."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from eagle_target.errors import ConnectError
from eagle_target.seals import new_key
from eagle_target_nccl.groups import SERVER, NcclGroup, TcpGroup, new_store, proven, read_unique_id
from eagle_target_nccl.proofs import Seals

if TYPE_CHECKING:
    import torch

    from eagle_target_nccl.gate import Gate
    from eagle_target_nccl.groups import PairGroup
    from eagle_target_nccl.proofs import Digest


class Meeting(ABC):
    """The server's end of one group that is to come, with a key of its own.

    Args:
        digest: of the tensors' bytes. timeout: seconds from now in which the group must come up.
    """

    def __init__(self, digest: Digest, timeout: float) -> None:
        self._key = new_key()
        self._deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._group: PairGroup | None = None
        self._is_cancelled = False
        self.seals = Seals(self._key, digest)

    def told(self) -> dict[str, Any]:
        """What the client is told; `open` is called on another thread meanwhile.

        Raises:
            ConnectError: there is nothing to tell, in time.
        """
        return {"key": self._key.hex(), **self._place()}

    def open(self) -> PairGroup:
        """The group, once the client has come and proven itself.

        Raises:
            TransportError: it has not.
        """
        group = self._meet()
        with self._lock:
            self._group, is_cancelled = group, self._is_cancelled
        if is_cancelled:
            group.abort()
            raise ConnectError("the channel was closed before its client came")
        return proven(group, self._deadline)

    def cancel(self) -> None:
        """Wait for the client no more, and end the group if it is up. Safe to call twice."""
        with self._lock:
            self._is_cancelled, group = True, self._group
        if group is not None:
            group.abort()

    @abstractmethod
    def _place(self) -> dict[str, Any]: ...

    @abstractmethod
    def _meet(self) -> PairGroup: ...


class TcpMeeting(Meeting):
    """A connection that the client makes.

    Args:
        gate, host: where it comes to. is_named: the client is told the host; else it knows.
    """

    def __init__(self, gate: Gate, host: str, digest: Digest, timeout: float, *, is_named: bool) -> None:
        super().__init__(digest, timeout)
        self._gate = gate
        self._is_named = is_named
        self._visit = gate.expect(host)

    def cancel(self) -> None:
        """Take no connection any more, and none that came too late."""
        self._gate.forget(self._visit)
        super().cancel()

    def _place(self) -> dict[str, Any]:
        host = {"host": self._visit.host} if self._is_named else {}
        return {"port": self._visit.port, "name": self._visit.name.hex(), **host}

    def _meet(self) -> PairGroup:
        return TcpGroup(self._visit.wait(self._deadline), SERVER, self.seals)


class NcclMeeting(Meeting):
    """A communicator whose id the client is told."""

    def __init__(self, device: torch.device, digest: Digest, timeout: float) -> None:
        super().__init__(digest, timeout)
        self._device = device
        self._store = new_store()

    def _place(self) -> dict[str, Any]:
        return {"id": read_unique_id(self._store, max(self._deadline - time.monotonic(), 0.0)).hex()}

    def _meet(self) -> PairGroup:
        return NcclGroup(self._store, SERVER, self._device, self.seals)
