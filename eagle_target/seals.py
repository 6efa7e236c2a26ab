"""Keys that a server gives a client over HTTP, and what shows on another connection that its sender has one."""

from __future__ import annotations

import hashlib
import hmac
import secrets

KEY_BYTES = 32
NONCE_BYTES = 32
SEAL_BYTES = 32


def new_key() -> bytes:
    """A key for one connection."""
    return secrets.token_bytes(KEY_BYTES)


def new_nonce() -> bytes:
    """What one end draws, so that nothing said on another connection is of use on this one."""
    return secrets.token_bytes(NONCE_BYTES)


def seal(key: bytes, *parts: bytes | str | int) -> bytes:
    """HMAC-SHA256 of parts; other parts, or the same ones split otherwise, have another."""
    text = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        text.update(len(data).to_bytes(8, "little") + data)
    return text.digest()


def is_seal(given: bytes, expected: bytes) -> bool:
    """Whether a seal is the expected one; takes as long whatever differs."""
    return hmac.compare_digest(given, expected)
