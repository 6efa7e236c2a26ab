"""What every request passes before its route: whom it is from, whether it may, what became of it."""

from __future__ import annotations

import base64
import ipaddress
import logging
import secrets
import ssl
import time
from typing import TYPE_CHECKING, Any

from eagle_target.auth import Tokens
from eagle_target.errors import ConfigError
from eagle_target.protocol import messages
from eagle_target.protocol.problems import ProblemType
from eagle_target.server.clients import MAX_CLIENT_LETTERS
from eagle_target.server.log import FIELDS, LogContext, printable, set_log_context
from eagle_target.server.problems import RECORD, problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from eagle_target.config import ServerConfig
    from eagle_target.server.clients import Presences

logger = logging.getLogger(__name__)

# A supervisor's probes carry no token; what they are told is in docs/protocol.md.
OPEN_PATHS = (messages.HEALTH, messages.READY)
AUTHORIZED = "eagle_target.authorized"
BEARER = "bearer"
# A browser cannot be told to send a bearer token: for the status page, and for it alone, the token may be a password.
BASIC = "basic"
BASIC_CHALLENGE = 'Basic realm="eagle-target: the token as password", charset="UTF-8"'
# Asked every few seconds by supervisors and scrapers, and by browsers that show the status page.
ROUTINE_PATHS = (messages.HEALTH, messages.READY, messages.METRICS, messages.STATUS)
# Longer parts of a path are hashes and channels' ids, or a stranger's.
MAX_PART_LETTERS = 16


def open_tokens(config: ServerConfig) -> Tokens:
    """The tokens a server's settings name.

    Raises:
        ConfigError: they cannot be read, or the server would stand open on an address others can reach.
    """
    tokens = Tokens(None if config.token is None else config.token.get_secret_value(), config.token_file)
    if is_loopback(config.host):
        return tokens
    if not tokens and config.tls_client_ca is None and not config.insecure:
        raise ConfigError(
            f"anybody who reaches {config.host}:{config.port} could use this server: give it token_file or "
            "EAGLE_TARGET_TOKEN, or tls_client_ca for clients with certificates; or say insecure where the network "
            "itself keeps strangers out"
        )
    if tokens and config.tls_cert is None:
        logger.warning("tokens and tensors travel in the clear on %s: give tls_cert and tls_key", config.host)
    return tokens


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name other than `localhost` counts as reached from elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_tls(config: ServerConfig) -> ssl.SSLContext | None:
    """What a server's settings say of TLS; None for plain HTTP.

    Raises:
        ConfigError: one of certificate and key is missing, or a file cannot be used.
    """
    if config.tls_cert is None and config.tls_key is None and config.tls_client_ca is None:
        return None
    if config.tls_cert is None or config.tls_key is None:
        raise ConfigError("TLS needs both tls_cert and tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, password=_no_password)
        if config.tls_client_ca is not None:
            context.load_verify_locations(config.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError, ValueError) as error:
        names = ", ".join(str(path) for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path)
        raise ConfigError(f"cannot use {names} for TLS: {error}") from error
    return context


class TokenGate:
    """An ASGI application that lets through only requests with a token, where there are tokens."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app = app
        self._tokens = tokens
        self._is_closed = bool(tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        authorized = not self._is_closed or self._tokens.accept(_token_of(scope))
        scope[AUTHORIZED] = authorized
        if authorized or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        answer = problem(
            ProblemType.UNAUTHORIZED, "this server takes requests with a token of its own only", close=True
        )
        answer.headers["WWW-Authenticate"] = "Bearer"
        if _is_page(scope):
            # A header of its own: Chromium reads one challenge a header.
            answer.headers.append("WWW-Authenticate", BASIC_CHALLENGE)
        await answer(scope, receive, send)


def _token_of(scope: Scope) -> str:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, credentials = (values[0].decode("latin-1") if len(values) == 1 else "").partition(" ")
    if scheme.lower() == BEARER:
        return credentials.strip()
    return _password_of(credentials.strip()) if scheme.lower() == BASIC and _is_page(scope) else ""


def _password_of(credentials: str) -> str:
    try:
        text = base64.b64decode(credentials, validate=True).decode("utf-8")
    except ValueError:
        return ""
    return text.partition(":")[2]


def _is_page(scope: Scope) -> bool:
    return bool(scope["path"] == messages.STATUS and scope["method"] in ("GET", "HEAD"))


def _no_password() -> str:
    # Without it OpenSSL asks on the terminal, for which nobody may be there.
    raise ValueError("the key is encrypted: give one without a password")


class RequestRecord:
    """A request from its headers on.

    Attributes:
        request_id: what the client calls it, or a new one. problem: last part of the answered problem's type.
        fields: what else the log should say of it.
    """

    def __init__(self, scope: Scope) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.request_id = headers.get(messages.REQUEST_ID.lower().encode()) or secrets.token_hex(8)
        self.client_id = headers.get(messages.CLIENT.lower().encode()) or address_of(scope)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.status = 0
        self.is_sent = False
        self.problem = ""
        self.fields: dict[str, Any] = {}
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since its headers came."""
        return time.perf_counter() - self._started

    @property
    def log_context(self) -> LogContext:
        """Whom lines of the log about it are about."""
        return LogContext(printable(self.request_id), printable(self.client_id))

    def note(self, message: Message) -> None:
        """See a part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.is_sent = not message.get("more_body", False)


class RequestRecorder:
    """An ASGI application whose every request is logged, and told about when it is over.

    Args:
        app: what answers. on_end: called with each record.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[RequestRecord], None]) -> None:
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; lines of the log that are written meanwhile bear its ids."""
        record = scope[RECORD] = RequestRecord(scope)
        # uvicorn runs each request in a context of its own, and logs how it ended there.
        set_log_context(record.log_context)

        async def send_noted(message: Message) -> None:
            record.note(message)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            # Starlette raises again what it has answered and `problem_of` has logged.
            if not record.is_sent:
                raise
        finally:
            _log(record)
            self._on_end(record)


def shown_path(path: str) -> str:
    """A path without hashes, ids of channels and whatever else a stranger may have put there."""
    parts = (printable(part) if len(part) <= MAX_PART_LETTERS else "*" for part in path.split("/")[:8])
    return "/".join(parts)


def _log(record: RequestRecord) -> None:
    level = logging.DEBUG if record.status < 400 or record.path in ROUTINE_PATHS else logging.INFO
    if record.status == 401 or (record.status >= 500 and record.status != 503):
        level = logging.WARNING
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": printable(record.method),
        "path": shown_path(record.path),
        "status": record.status,
        "seconds": round(record.seconds, 6),
        **({"problem": record.problem} if record.problem else {}),
        **record.fields,
    }
    shown = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.log(level, "answered %s", shown, extra={FIELDS: fields})


class PresenceGate:
    """An ASGI application that notes whose requests pass; probes and scrapers are no clients.

    Args:
        app: what answers. presences: where clients are noted.
    """

    def __init__(self, app: ASGIApp, presences: Presences) -> None:
        self._app = app
        self._presences = presences

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count it as its client's sign of life."""
        path, address = scope["path"], address_of(scope)
        client = header_of(scope, messages.CLIENT)
        if not client and path == messages.SUPERVISION:
            client = address
        if not client or not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        # What a client sends while it ends must not make it one that is there.
        connects = not path.startswith((messages.CLIENTS, messages.TRANSPORTS)) or scope["method"] == "POST"
        with self._presences.request(client[:MAX_CLIENT_LETTERS], address, connects=connects):
            await self._app(scope, receive, send)


def address_of(scope: Scope) -> str:
    """The address a request comes from."""
    return scope["client"][0] if scope.get("client") else ""


def own_address_of(scope: Scope) -> str:
    """The address of this machine that a request's connection came in at."""
    return scope["server"][0] if scope.get("server") else ""


def header_of(scope: Scope, name: str) -> str:
    """A request's header; empty where it has none."""
    wanted = name.lower().encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")
