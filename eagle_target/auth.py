"""Who a client is, and who answers it: bearer tokens, from a file that may change; certificates."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import ssl
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from eagle_target.config import ENVIRONMENT_PREFIX, ClientConfig, load_config
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

SHORTEST_TOKEN = 16
LONGEST_TOKEN = 4096
MAX_FILE_BYTES = 1 << 20
FIELDS = ("token", "token_file", "ca_file", "client_cert", "client_key")


class Tokens:
    """One token, those of a file, or both. Safe to use from several threads.

    Args:
        token: one token. path: file with a token a line; blank lines and those that start with `#` are passed over.
            It is read again when it changes; while it cannot be read, the tokens read last stand.

    Raises:
        ConfigError: a file that cannot be read or has no token, or a token that is none. No message shows a token.
    """

    def __init__(self, token: str | None = None, path: Path | None = None) -> None:
        self._given = [] if token is None else [check_token(token, "the token")]
        self._path = path
        self._lock = threading.Lock()
        self._state = None if path is None else _state_of(path)
        self._read = [] if path is None else read_tokens(path)

    def __repr__(self) -> str:
        return f"Tokens({self._path})"

    def __bool__(self) -> bool:
        return bool(self._given or self._read)

    def current(self) -> Sequence[str]:
        """The tokens that hold now, the one to send first."""
        if self._path is None:
            return self._given
        with self._lock:
            state = _state_of(self._path)
            if state != self._state:
                self._state = state
                try:
                    self._read = read_tokens(self._path)
                    logger.info("read %s again: %d tokens", self._path, len(self._read))
                except ConfigError as error:
                    logger.error("the tokens read before stand: %s", error)  # noqa: TRY400 - the reason is enough
            return [*self._given, *self._read]

    def accept(self, token: str) -> bool:
        """Whether it is one of the tokens; takes as long whichever it is."""
        given = _digest(token)
        matches = [hmac.compare_digest(given, _digest(known)) for known in self.current()]
        return any(matches)


def read_tokens(path: Path) -> list[str]:
    """Read a token file.

    Raises:
        ConfigError: it cannot be read, has no token, or a line that is no token, with its number.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode("ascii")
    except OSError as error:
        raise ConfigError(f"cannot read the token file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        # Its message would show the bytes.
        raise ConfigError(f"the token file {path} is not ASCII text") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the token file {path} has more than {MAX_FILE_BYTES} bytes")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    tokens = [check_token(line, f"{path}:{number}") for number, line in lines if line and not line.startswith("#")]
    if not tokens:
        raise ConfigError(f"the token file {path} has no token: one a line is expected")
    return tokens


def check_token(token: str, where: str) -> str:
    """Return a token that can be sent in a header.

    Raises:
        ConfigError: too short, too long, or of characters a header cannot carry; the message does not show it.
    """
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or any(not "!" <= letter <= "~" for letter in token):
        raise ConfigError(
            f"{where} is no token: {SHORTEST_TOKEN} to {LONGEST_TOKEN} visible ASCII characters without spaces are "
            "expected, such as `openssl rand -hex 32` prints"
        )
    return token


def _digest(token: str) -> bytes:
    # Of equal length, so that the comparison tells nothing of a token's own.
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


class AccessFiles(TypedDict, total=False):
    """The files of `ClientConfig` that say who a client is and whom it trusts, as command lines hand them on."""

    token_file: Path | str | None
    ca_file: Path | str | None
    client_cert: Path | str | None
    client_key: Path | str | None


@dataclass(frozen=True, slots=True)
class Access:
    """What goes with every request. tls: for https; None where there is none."""

    tokens: Tokens = field(default_factory=Tokens)
    tls: ssl.SSLContext | None = None

    def headers(self) -> dict[str, str]:
        """The token that holds now, as a header."""
        tokens = self.tokens.current()
        return {"Authorization": f"Bearer {tokens[0]}"} if tokens else {}


def open_access(config: ClientConfig, environment: Mapping[str, str] | None = None) -> Access:
    """What a client's settings name; where they name no token or no certificates, EAGLE_TARGET_* variables do.

    Args:
        environment: `os.environ` where it is None.

    Raises:
        ConfigError: a file that cannot be used, a token that is none, or one of certificate and key alone.
    """
    names = {f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in ("token", *AccessFiles.__annotations__)}
    variables = os.environ if environment is None else environment
    chosen = {name: text for name, text in variables.items() if name in names}
    others = load_config(ClientConfig, path=None, environment=chosen, overrides={})
    tokens = config if config.token or config.token_file else others
    certificate = config if config.client_cert or config.client_key else others
    return Access(
        Tokens(None if tokens.token is None else tokens.token.get_secret_value(), tokens.token_file),
        _make_tls(config.ca_file or others.ca_file, certificate.client_cert, certificate.client_key),
    )


def _make_tls(ca_file: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    if (cert is None) != (key is None):
        raise ConfigError("a client's certificate needs both client_cert and client_key")
    try:
        context = ssl.create_default_context(cafile=ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # What stands between the two ends must not choose HTTP/2.
        context.set_alpn_protocols(["http/1.1"])
        if cert is not None:
            context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        names = ", ".join(str(path) for path in (ca_file, cert, key) if path)
        raise ConfigError(f"cannot use {names} for TLS: {error}") from error
    return context


def _no_password() -> str:
    # Without it OpenSSL asks on the terminal, for which nobody may be there.
    raise ValueError("the key is encrypted: give one without a password")
