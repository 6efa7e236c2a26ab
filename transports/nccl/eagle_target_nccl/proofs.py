"""What the two ends of a group prove to each other: that they have the key which the server gave over HTTP.

Each seal says who speaks, so that nothing can be thrown back at its speaker, and depends on random values of both ends,
so that nothing said in one group is of use in another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import xxhash

from eagle_target.seals import seal

if TYPE_CHECKING:
    from collections.abc import Callable

# Digests of the tensors' bytes. `sha256` is for those whose key came over TLS, where nobody else has it and so nobody
# else can make up bytes. Over plain HTTP whoever can change bytes can change the key, too: `xxh3_128`, twenty times as
# fast, then tells all that goes wrong without purpose, and bytes of who cannot read along.
Digest = Literal["sha256", "xxh3_128"]
DIGESTS: tuple[Digest, ...] = ("sha256", "xxh3_128")


class Hash(Protocol):
    """A digest that is being made."""

    def update(self, data: memoryview, /) -> None:
        """Take the next bytes."""
        ...

    def digest(self) -> bytes:
        """Of all bytes so far."""
        ...


@dataclass(frozen=True, slots=True)
class Transfer:
    """What both ends know of a transfer before its bytes come.

    name: no other transfer of the channel has it; the client read it in the ticket. number: of the pull; no other of
    the group has it. length: bytes.
    """

    name: str
    number: int
    length: int


class Seals:
    """What shows in one group that its sender has the key.

    Args:
        key: of this group alone, from the server over HTTP. digest: of the tensors' bytes.
    """

    def __init__(self, key: bytes, digest: Digest) -> None:
        self._key = key
        self._nonces = b""
        self._new_hash: Callable[[], Hash] = hashlib.sha256 if digest == "sha256" else self._seeded

    def meet(self, server_nonce: bytes, client_nonce: bytes) -> None:
        """Bind all that follows to what both ends have drawn."""
        self._nonces = server_nonce + client_nonce

    def of_end(self, rank: int) -> bytes:
        """The proof that one end of the group has the key."""
        return seal(self._key, self._nonces, "end", rank)

    def of_transfer(self, rank: int, transfer: Transfer, content: bytes) -> bytes:
        """What one end says of a transfer that it has sent, or received. content: the digest of its bytes."""
        said = (transfer.name, transfer.number, transfer.length, content)
        return seal(self._key, self._nonces, "transfer", rank, *said)

    def new_hash(self) -> Hash:
        """A digest of tensors' bytes."""
        return self._new_hash()

    def _seeded(self) -> Hash:
        # Not to be foreseen without the key; the digest itself is only shown inside a seal.
        return xxhash.xxh3_128(seed=int.from_bytes(seal(self._key, self._nonces, "seed")[:8], "little"))
