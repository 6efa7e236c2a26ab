"""How a client shows who it is, and knows who answers: token, certificates."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from eagle_target.config import ClientConfig, read_environment
from eagle_target.errors import ConfigError
from eagle_target.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

FIELDS = ("token", "token_file", "ca_file", "client_cert", "client_key")


class AccessFiles(TypedDict, total=False):
    """The files of a client's settings, as `open_access` and `from_urls` take them."""

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


def open_access(
    *,
    token: str | None = None,
    token_file: Path | str | None = None,
    ca_file: Path | str | None = None,
    client_cert: Path | str | None = None,
    client_key: Path | str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Access:
    """What a client's settings name; where they name no token or no certificates, EAGLE_TARGET_* variables do.

    Args:
        environment: `os.environ` where it is None.

    Raises:
        ConfigError: a file that cannot be used, a token that is none, or one of certificate and key alone.
    """
    variables = _variables(os.environ if environment is None else environment)
    if token is None and token_file is None:
        token, token_file = variables.get("token"), variables.get("token_file")
    if client_cert is None and client_key is None:
        client_cert, client_key = variables.get("client_cert"), variables.get("client_key")
    authority = variables.get("ca_file") if ca_file is None else ca_file
    tokens = Tokens(token, None if token_file is None else Path(token_file))
    return Access(tokens, _make_tls(authority, client_cert, client_key))


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    names = {f"EAGLE_TARGET_{name.upper()}" for name in FIELDS}
    chosen = {name: text for name, text in environment.items() if name in names}
    return {name: str(value) for name, value in read_environment(ClientConfig, chosen).items() if value is not None}


def _make_tls(ca_file: Path | str | None, cert: Path | str | None, key: Path | str | None) -> ssl.SSLContext:
    if (cert is None) != (key is None):
        raise ConfigError("a client's certificate needs both client_cert and client_key")
    try:
        context = ssl.create_default_context(cafile=ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if cert is not None:
            context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        names = ", ".join(str(path) for path in (ca_file, cert, key) if path)
        raise ConfigError(f"cannot use {names} for TLS: {error}") from error
    return context


def _no_password() -> str:
    # Without it OpenSSL asks on the terminal, for which nobody may be there.
    raise ValueError("the key is encrypted: give one without a password")
