"""Every error the project raises, in one tree.

EagleTargetError
├── ConfigError            a setting is unknown, missing or of the wrong kind
├── ContractError          a batch, request or supervision breaks the contract (also a ValueError)
│   └── VocabMappingError  a vocabulary mapping is invalid, missing or unknown to the server
├── PluginError            a plugin is broken, duplicated or not installed
├── AdapterError           an engine failed or cannot do what was asked
│   ├── EngineDead             it is gone: nothing it is asked from now on can go well
│   └── EngineStuck            a call of it does not return
├── TransportError         tensors could not be moved
│   ├── ConnectError           no connection to a server
│   │   └── TransportRefused       the server is there, but no transport asked for works with it
│   ├── TransferTimeout        a transfer passed its deadline
│   └── ProtocolError          a peer sent something that is not the protocol
├── BenchmarkError         something could not be measured
└── ServerError            a server answered with a problem
    ├── Overloaded             its queue is full; try again after `retry_after` seconds
    ├── Unavailable            it is loading, draining or its engine failed
    └── RequestTooLarge        the request is over a limit of that server
"""

from __future__ import annotations

from typing import ClassVar


class EagleTargetError(Exception):
    """Base of every error raised by eagle-target.

    Attributes:
        exit_status: of a command that it ends.
    """

    exit_status: ClassVar[int] = 1


class ConfigError(EagleTargetError):
    """A setting is unknown, missing or of the wrong kind."""


class ContractError(EagleTargetError, ValueError):
    """A batch, request or supervision breaks the contract."""


class VocabMappingError(ContractError):
    """A vocabulary mapping is invalid, missing or unknown to the server."""


class PluginError(EagleTargetError):
    """A plugin is broken, duplicated or not installed."""


class AdapterError(EagleTargetError):
    """An engine failed or cannot do what was asked."""


class EngineDead(AdapterError):
    """The engine is gone: nothing it is asked from now on can go well."""

    exit_status = 3


class EngineStuck(AdapterError):
    """A call of the engine does not return."""

    exit_status = 4


class TransportError(EagleTargetError):
    """Tensors could not be moved."""


class ConnectError(TransportError):
    """No connection to a server."""


class TransportRefused(ConnectError):
    """The server is there, but no transport that was asked for works with it."""


class TransferTimeout(TransportError):
    """A transfer passed its deadline."""


class ProtocolError(TransportError):
    """A peer sent something that is not the protocol."""


class BenchmarkError(EagleTargetError):
    """Something could not be measured: a process that takes part is gone, say."""


class ServerError(EagleTargetError):
    """A server answered with a problem (RFC 9457).

    Args:
        message: what was wrong, the value and what to do.
        status: HTTP status of the answer.
        problem: last segment of the problem's `type`, stable across versions.
        retry_after: seconds the server asks to wait, if it said so.
    """

    def __init__(
        self, message: str, *, status: int = 500, problem: str = "internal", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problem = problem
        self.retry_after = retry_after


class Overloaded(ServerError):
    """The server's queue is full; try again after `retry_after` seconds."""


class Unavailable(ServerError):
    """The server is loading, draining or its engine failed."""


class RequestTooLarge(ServerError):
    """The request is over a limit of that server."""
