"""How many servers keep a trainer busy, and how many batches have to be on their way: from rates that were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eagle_target.errors import ConfigError

# Of what a server was measured to do, what is counted on.
BUSY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured.

    batch_tokens: real tokens of a batch. server_tokens: a second, of one server with enough clients.
    latency: seconds from the request to the finished batch of a client that is alone, as nine of ten batches keep to.
    client_seconds: the client's own part of a batch: transfer and assembly. batch_bytes: received for one.
    """

    batch_tokens: int
    server_tokens: float
    latency: float
    client_seconds: float
    batch_bytes: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """servers, depth: what to use. needed_tokens: a second, of the trainer. busy: share of the servers' time.
    client_busy: share of the step that the client's own part of a batch takes; over 1 the trainer waits all the same.
    waiting_bytes: of the batches that lie ready, or are on their way.
    """

    servers: int
    depth: int
    needed_tokens: float
    busy: float
    client_busy: float
    waiting_bytes: float


def advise(rates: Rates, step_time: float) -> Advice:
    """Advise for a trainer that takes `step_time` seconds a batch. docs/benchmarking.md has the formula.

    Raises:
        ConfigError: the step takes no time.
    """
    if not step_time > 0:
        raise ConfigError(f"step_time must be over 0 seconds, got {step_time}")
    needed = rates.batch_tokens / step_time
    servers = max(1, math.ceil(needed / (BUSY_SHARE * rates.server_tokens)))
    # As many as steps fit the latency, and one a server at least. One more: a server then has the next request while
    # it sends an answer, and a batch may be late.
    depth = max(servers, math.ceil(rates.latency / step_time)) + 1
    return Advice(
        servers=servers,
        depth=depth,
        needed_tokens=needed,
        busy=needed / (servers * rates.server_tokens),
        client_busy=rates.client_seconds / step_time,
        waiting_bytes=depth * rates.batch_bytes,
    )
