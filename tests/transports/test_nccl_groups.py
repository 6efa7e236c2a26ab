"""One end of a group: what it holds on to when a transfer breaks, and what the two ends prove to each other."""

from __future__ import annotations

import socket
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_nccl.groups import CLIENT, SERVER, PairGroup, TcpGroup
from eagle_target_nccl.proofs import DIGESTS, Digest, Seals, Transfer

from eagle_target.errors import ConnectError, ProtocolError, TransferTimeout, TransportError
from eagle_target.seals import NONCE_BYTES, SEAL_BYTES, new_key
from tests.server.cases import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEY = new_key()
TRANSFER = Transfer("t1", 1, 12)
SEAL = -1


class Work:
    """What torch gives for a message that is under way; it holds the connection."""


class BreakingGroup(PairGroup):
    """A connection ends after so many messages are under way, or when the first is waited for."""

    def __init__(self, rank: int, breaks_after: int) -> None:
        super().__init__(rank, torch.device("cpu"), Seals(KEY, "sha256"))
        self._breaks_after = breaks_after
        self.under_way: list[weakref.ref[Work]] = []

    def abort(self) -> None:
        pass

    @property
    def _is_aborted(self) -> bool:
        return False

    def _send(self, message: torch.Tensor, deadline: float) -> Work:
        return self._begin()

    def _receive(self, message: torch.Tensor, deadline: float) -> Work:
        return self._begin()

    def _begin(self) -> Work:
        if len(self.under_way) == self._breaks_after:
            raise RuntimeError("Connection closed by peer")
        work = Work()
        self.under_way.append(weakref.ref(work))
        return work

    def _wait(self, work: Any, deadline: float) -> None:
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("breaks_after", [3, 4, 100])
@pytest.mark.parametrize(("rank", "transfer"), [(CLIENT, "pull"), (SERVER, "push")])
def test_an_error_that_is_kept_keeps_no_connection(rank: int, transfer: str, breaks_after: int) -> None:
    group = BreakingGroup(rank, breaks_after)
    messages = [torch.empty(4, dtype=torch.uint8) for _ in range(3)]
    with pytest.raises(ConnectError) as kept:
        getattr(group, transfer)(messages, TRANSFER, time.monotonic() + 1)
    assert len(group.under_way) >= len(messages)
    assert [work() for work in group.under_way if work() is not None] == []
    assert kept.value.__cause__ is not None


class Line(socket.socket):
    """A connection that changes a byte of what is read `flip` bytes at a time."""

    flip = 0

    def recv_into(self, buffer: Any, *arguments: int) -> int:
        count = super().recv_into(buffer, *arguments)
        if len(buffer) == self.flip:
            buffer[7] ^= 1
        return count


class Ends:
    """Both ends of a group over one connection, each on a thread while it does something."""

    def __init__(self, server: Seals, client: Seals) -> None:
        left, right = _connection()
        self.line = Line(fileno=right.detach())
        self.server, self.client = TcpGroup(left, SERVER, server), TcpGroup(self.line, CLIENT, client)

    def both(self, server: Callable[[], object], client: Callable[[], object]) -> list[TransportError | None]:
        with ThreadPoolExecutor(2) as threads:
            done = [threads.submit(server), threads.submit(client)]
            return [each.exception(PATIENCE_SECONDS) for each in done]  # type: ignore[misc]

    def prove(self, seconds: float = PATIENCE_SECONDS) -> list[TransportError | None]:
        deadline = time.monotonic() + seconds

        def end(group: TcpGroup) -> None:
            try:
                group.prove(deadline)
            except BaseException:
                group.abort()
                raise

        return self.both(lambda: end(self.server), lambda: end(self.client))

    def transfer(
        self, sent: bytes, *, server: Transfer = TRANSFER, client: Transfer = TRANSFER
    ) -> tuple[bytes, list[TransportError | None]]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        message, received = torch.tensor(list(sent), dtype=torch.uint8), torch.zeros(len(sent), dtype=torch.uint8)

        def push() -> None:
            self.server.push([message], server, deadline)

        def pull() -> None:
            try:
                self.client.pull([received], client, deadline)
            except BaseException:
                self.client.abort()
                raise

        errors = self.both(push, pull)
        return bytes(received.tolist()), errors

    def abort(self) -> None:
        self.server.abort()
        self.client.abort()


def _connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        return left, listener.accept()[0]


@pytest.fixture(params=DIGESTS)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    digest: Digest = request.param
    made = Ends(Seals(KEY, digest), Seals(KEY, digest))
    yield made
    made.abort()


def test_two_ends_with_one_key_transfer_bytes(ends: Ends) -> None:
    assert ends.prove() == [None, None]
    for number in (1, 2):
        transfer = Transfer("t", number, 5)
        assert ends.transfer(b"bytes", server=transfer, client=transfer) == (b"bytes", [None, None])


@pytest.mark.parametrize("whose", ["server", "client"])
def test_an_end_with_another_key_is_found_out_by_the_other(whose: str) -> None:
    seals = {"server": Seals(KEY, "sha256"), "client": Seals(KEY, "sha256"), whose: Seals(new_key(), "sha256")}
    ends = Ends(**seals)
    errors = dict(zip(("server", "client"), ends.prove(), strict=True))
    assert all(isinstance(error, TransportError) for error in errors.values())
    # The client is the first to show its proof.
    assert isinstance(errors["server"], ProtocolError)
    ends.abort()


def test_a_server_without_the_key_is_found_out_by_its_client() -> None:
    class Trusting(Seals):
        """Takes every proof for right, and has none."""

        def of_end(self, rank: int) -> bytes:
            return bytes(SEAL_BYTES)

    class TrustingGroup(TcpGroup):
        def _check_end(self, theirs: bytes) -> None:
            pass

    left, right = _connection()
    ends = Ends(Seals(KEY, "sha256"), Seals(KEY, "sha256"))
    ends.abort()
    ends.server, ends.client = (
        TrustingGroup(left, SERVER, Trusting(KEY, "sha256")),
        TcpGroup(right, CLIENT, Seals(KEY, "sha256")),
    )
    _, error = ends.prove()
    assert isinstance(error, ProtocolError)
    ends.abort()


def test_a_proof_thrown_back_or_played_again_is_none() -> None:
    seals = [Seals(KEY, "sha256") for _ in range(2)]
    for each in seals:
        each.meet(bytes(NONCE_BYTES), bytes(NONCE_BYTES))
    assert seals[0].of_end(SERVER) == seals[1].of_end(SERVER) != seals[0].of_end(CLIENT)
    assert seals[0].of_transfer(SERVER, TRANSFER, b"") != seals[0].of_transfer(CLIENT, TRANSFER, b"")
    said = seals[0].of_end(SERVER)
    seals[0].meet(b"\1" * NONCE_BYTES, bytes(NONCE_BYTES))
    assert said != seals[0].of_end(SERVER)
    seals[1].meet(bytes(NONCE_BYTES), b"\1" * NONCE_BYTES)
    assert said != seals[1].of_end(SERVER)


def test_one_that_says_nothing_is_given_up_in_time(ends: Ends) -> None:
    for group in (ends.server, ends.client):
        silent, other = _connection()
        alone = TcpGroup(other, group.rank, Seals(KEY, "sha256"))
        with pytest.raises(TransferTimeout):
            alone.prove(time.monotonic() + 0.05)
        alone.abort()
        silent.close()


@pytest.mark.parametrize(
    "other", [Transfer("t2", 1, 12), Transfer("t1", 2, 12), Transfer("t1", 1, 13)], ids=["name", "number", "length"]
)
def test_another_transfer_is_not_taken_for_this_one(ends: Ends, other: Transfer) -> None:
    assert ends.prove() == [None, None]
    _, (pushed, pulled) = ends.transfer(b"twelve bytes", server=other)
    assert isinstance(pulled, ProtocolError)
    assert isinstance(pushed, TransportError)


def test_a_byte_that_was_changed_on_the_way_is_found(ends: Ends) -> None:
    assert ends.prove() == [None, None]
    ends.line.flip = TRANSFER.length
    received, (pushed, pulled) = ends.transfer(b"twelve bytes")
    assert received != b"twelve bytes"
    assert isinstance(pulled, ProtocolError)
    assert isinstance(pushed, TransportError)
