"""One server: the HTTP connections to it, the client's lease, the open channel, the mappings it was given."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from eagle_target.backoff import backoff
from eagle_target.client.lease import LEAVE_SECONDS, ChannelControl, Lease
from eagle_target.client.timings import received
from eagle_target.contract.runner import DraftHead
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import (
    ConnectError,
    ProtocolError,
    ServerError,
    TransportRefused,
)
from eagle_target.plugins.options import build_model
from eagle_target.plugins.registry import unusable_reason
from eagle_target.protocol import messages
from eagle_target.protocol.problems import ProblemType
from eagle_target.protocol.tensors import encode_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    import torch

    from eagle_target.client.http import ServerConnection
    from eagle_target.client.timings import Received
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.plugins.registry import Plugins
    from eagle_target.plugins.transport import ClientChannel, Transport
    from eagle_target.protocol.messages import Handshake, Limits

    AnySink = TypeVar("AnySink", bound=Sink)

logger = logging.getLogger(__name__)

AUTO = ("auto",)
# Once for a mapping that a restarted server forgot, once for a channel it forgot, or for one that broke.
REPAIRS = 2
# Until a transport that was stepped down from is tried for again.
FIRST_RETURN_SECONDS = 1.0
LONGEST_RETURN_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class OpenChannel:
    """A channel to a server.

    refused: why each better transport is not used, by name. users: requests that hold it.
    retired: no further request takes it; it is closed when the last user is done.
    """

    transport: str
    channel: ClientChannel
    control: ChannelControl
    refused: dict[str, str]
    users: int = 0
    retired: bool = False

    def close(self) -> None:
        """Close both ends, as far as the server can be told. Safe to call twice."""
        self.channel.close()
        self.control.give_up()


class ServerSession:
    """One server, as one client uses it. Called from several threads.

    Args:
        connection: HTTP to it, which is the session's from now on. plugins: where transports come from.
        transports: names in order of preference; `auto` for the best both ends have.
        transport_options: options by transport name. device: where batches go.

    Attributes:
        transport: that of the open channel; empty where there is none yet.
        refused: why each better transport is not used, by name.
        fallbacks: times that a transport broke and another was taken.
    """

    def __init__(
        self,
        connection: ServerConnection,
        *,
        plugins: Plugins,
        transports: Sequence[str],
        transport_options: Mapping[str, Mapping[str, Any]],
        device: str = "cpu",
    ) -> None:
        self.transport = ""
        self.refused: dict[str, str] = {}
        self.fallbacks = 0
        self._connection = connection
        self._lease = Lease(connection)
        self._plugins = plugins
        self._auto = tuple(transports) == AUTO
        self._transports = transports
        self._transport_options = transport_options
        self._device = device
        self._lock = threading.Lock()
        self._handshake: Handshake | None = None
        self._channel: OpenChannel | None = None
        self._closed = threading.Event()
        self._uploaded: set[str] = set()
        # When a better transport is tried for: never, unless one was stepped down from.
        self._return_at = math.inf
        self._failed_returns = 0

    @property
    def url(self) -> str:
        """The server's address."""
        return self._connection.url

    @property
    def handshake(self) -> Handshake:
        """What the server said it serves.

        Raises:
            ConnectError: it was not asked yet.
        """
        if self._handshake is None:
            raise ConnectError(f"{self.url} was not connected to yet")
        return self._handshake

    def shake_hands(self) -> Handshake:
        """Ask the server what it serves and open a channel."""
        self._handshake = self._ask_what_it_serves()
        with self._lock:
            if self._channel is None:
                self._use(self._negotiate())
        return self._handshake

    def follow(self, handshake: Handshake) -> None:
        """Take for this server's what another serves; it is asked, and held to that, when it is used."""
        with self._lock:
            self._handshake = handshake
            if self._channel is not None:
                self._retire(self._channel)
            self.transport = ""

    def supervise(self, request: SupervisionRequest, make_sink: Callable[[], AnySink]) -> tuple[AnySink, Received]:
        """Have a request answered into a new sink; uploads what the server has forgotten, mends a channel that broke.

        Returns:
            the sink, and the bytes and seconds it took.

        Raises:
            RequestTooLarge: more than the server said it takes; nothing was sent.
            ProtocolError: the answer is not to this request, or from another target.
        """
        check_limits(self.url, request, self.handshake.limits)
        self._return_to_better()
        for _ in range(REPAIRS):
            with self._borrow() as channel:
                try:
                    return self._ask(request, make_sink(), channel)
                except ServerError as error:
                    if error.problem == ProblemType.UNKNOWN_VOCAB_MAPPING and request.mapping is not None:
                        self._uploaded.discard(request.mapping.sha256)
                    elif error.problem == ProblemType.UNKNOWN_CHANNEL:
                        channel.control.lost = True
                    else:
                        raise
                except ConnectError as error:
                    if not channel.channel.broken:
                        raise
                    logger.warning("%s: a %s channel broke: %s", self.url, channel.transport, error)
        with self._borrow() as channel:
            return self._ask(request, make_sink(), channel)

    def upload_mapping(self, mapping: VocabMapping) -> None:
        """Give the server a vocabulary mapping, unless it has been given it."""
        if mapping.sha256 not in self._uploaded:
            path = f"{messages.VOCAB_MAPPINGS}/{mapping.sha256}"
            self._connection.request("PUT", path, messages.encode_mapping(mapping)).read_all(0)
            self._uploaded.add(mapping.sha256)

    def fetch_input_embedding(self) -> torch.Tensor:
        """The target's input embedding `[vocab, hidden]`."""
        tensors, _ = self._fetch("GET", messages.INPUT_EMBEDDINGS, answered="")
        check_weights(self.url, tensors, self.handshake.target.vocab_size, self.handshake.target.hidden_size)
        return tensors["weight"]

    def fetch_draft_head(self, mapping: VocabMapping) -> DraftHead:
        """The mapping's rows of the LM head."""
        token_ids = mapping.selected_token_ids
        tensors, metadata = self._fetch(
            "POST",
            messages.LM_HEAD,
            encode_tensors({"token_ids": token_ids}, {}),
            answered=messages.head_digest(token_ids),
        )
        check_weights(self.url, tensors, len(token_ids), self.handshake.target.hidden_size)
        soft_cap = metadata.get("soft_cap", "")
        return DraftHead(
            weight=tensors["weight"],
            bias=tensors.get("bias"),
            logit_scale=float(metadata.get("logit_scale", "1.0")),
            soft_cap=float(soft_cap) if soft_cap else None,
        )

    def close(self) -> None:
        """Close the channel, take leave and close the connections: requests under way end. Safe to call twice."""
        self._closed.set()
        if not self._lock.acquire(timeout=LEAVE_SECONDS):
            self._connection.close()  # who has it waits for a server that is silent
            self._lock.acquire()
        channel, self._channel = self._channel, None
        self._lock.release()
        if channel is not None:
            channel.close()
        self._lease.end()
        self._connection.close()

    def _ask(self, request: SupervisionRequest, sink: AnySink, channel: OpenChannel) -> tuple[AnySink, Received]:
        if request.mapping is not None:
            self.upload_mapping(request.mapping)
        identity = self._identity(messages.request_digest(request))
        headers = {
            messages.REQUEST_ID: identity[messages.REQUEST_ID],
            messages.TRANSPORT: channel.transport,
        }
        if channel.control.channel_id is not None:
            headers[messages.CHANNEL] = channel.control.channel_id
        if channel.refused:
            headers[messages.PASSED_OVER] = ",".join(channel.refused)
        body = self._connection.request("POST", messages.SUPERVISION, messages.encode_request(request), headers)
        expected = identity if request.mapping is None else {**identity, messages.MAPPING: request.mapping.sha256}
        try:
            check_answer(self.url, body.headers, expected)
            started = time.perf_counter()
            metadata = channel.channel.receive(body, sink)
            body.check()
            check_answer(self.url, metadata, expected)
            return sink, received(body.headers, body.length, time.perf_counter() - started)
        finally:
            body.close()

    def _identity(self, answered: str) -> dict[str, str]:
        """A new request's id, and what else its answer must say of itself."""
        return {
            messages.REQUEST_ID: secrets.token_hex(8),
            messages.ANSWERED: answered,
            messages.FINGERPRINT: self.handshake.fingerprint,
        }

    def _fetch(
        self, method: str, path: str, parts: Sequence[memoryview] = (), *, answered: str
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        identity = self._identity(answered)
        body = self._connection.request(method, path, parts, {messages.REQUEST_ID: identity[messages.REQUEST_ID]})
        tensors = PackedTensors()
        wire = self._plugins.transports.get("wire")
        try:
            check_answer(self.url, body.headers, identity)
            metadata = wire.connect(wire.options_model(), {}, self._control_of("wire")).receive(body, tensors)
            body.check()
        finally:
            body.close()
        return tensors, metadata

    @contextmanager
    def _borrow(self) -> Iterator[OpenChannel]:
        """The channel, opened again where there is none; it is not closed while it is borrowed."""
        with self._lock:
            channel = self._current()
            channel.users += 1
        try:
            yield channel
        finally:
            with self._lock:
                channel.users -= 1
                if channel.retired and not channel.users:
                    channel.close()

    def _current(self) -> OpenChannel:
        if self._closed.is_set():
            raise ConnectError(f"the channel to {self.url} is closed")
        if self._channel is not None and self._channel.channel.broken:
            self._step_down(self._channel)
        elif self._channel is not None and self._channel.control.lost:
            self._retire(self._channel)
        if self._channel is None:
            self._renew_offers()
            self._use(self._negotiate())
        if self._channel is None:
            raise ConnectError(f"no channel to {self.url} is open")
        return self._channel

    def _use(self, channel: OpenChannel) -> None:
        """Have requests take a channel from now on."""
        self._channel = channel
        self.transport, self.refused = channel.transport, channel.refused
        self._return_at, self._failed_returns = math.inf, 0

    def _retire(self, channel: OpenChannel) -> None:
        """Use a channel for no further request; it is closed when nobody uses it any more."""
        channel.retired = True
        if self._channel is channel:
            self._channel = None
        if not channel.users:
            channel.close()

    def _step_down(self, broken: OpenChannel) -> None:
        """From a channel that broke to the next transport, where there is a choice."""
        self._retire(broken)
        if not self._auto and len(self._transports) < 2:
            return
        logger.warning("%s: transport %r broke and is stepped down from", self.url, broken.transport)
        self._use(self._negotiate(without={broken.transport}))
        self.fallbacks += 1
        self._return_at = time.monotonic() + FIRST_RETURN_SECONDS

    def _return_to_better(self) -> None:
        """Try for what was stepped down from, if it is time to; other requests go on over the present channel."""
        with self._lock:
            present = self._channel
            if present is None or time.monotonic() < self._return_at:
                return
            self._return_at = math.inf
        better: OpenChannel | None = None
        try:
            better = self._negotiate(better_than=present.transport)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request does without
            logger.debug("%s: no better transport yet: %s", self.url, error)
        with self._lock:
            if self._channel is present and not self._closed.is_set():
                if better is not None:
                    self._use(better)
                    self._retire(present)
                    logger.info("%s: back on transport %r", self.url, better.transport)
                    return
                self._failed_returns += 1
                pause = backoff(self._failed_returns, first=FIRST_RETURN_SECONDS, longest=LONGEST_RETURN_SECONDS)
                self._return_at = time.monotonic() + pause
        if better is not None:
            better.close()

    def _ask_what_it_serves(self) -> Handshake:
        handshake = messages.read_handshake(self._connection.request_json("GET", messages.TARGET))
        self._lease.begin()
        return handshake

    def _renew_offers(self) -> None:
        """Ask again what the server offers: it was restarted, and may listen elsewhere now."""
        handshake = self._ask_what_it_serves()
        if handshake.fingerprint != self.handshake.fingerprint:
            raise ProtocolError(f"{self.url} serves another target than before, or than the others")
        self._handshake = handshake

    def _negotiate(self, *, without: Collection[str] = (), better_than: str = "") -> OpenChannel:
        """Open a channel on the first transport that works.

        Args:
            without: transports not to try; they broke just now. better_than: try only what is preferred to it.

        Raises:
            TransportRefused: none works, with the reason of each.
        """
        offers = self.handshake.transports
        refused: dict[str, str] = {}
        for transport in self._candidates(offers):
            name = transport.name
            if name == better_than:
                break
            control = self._control_of(name)
            reason = "its channel broke" if name in without else self._refusal(transport, control)
            if reason is None:
                try:
                    channel = transport.connect(self._options(transport), offers[name], control)
                except ConnectError as error:
                    reason = str(error)
                    control.give_up()
                except BaseException:
                    control.give_up()
                    raise
                else:
                    if refused:
                        level = logging.INFO if self._auto else logging.WARNING
                        logger.log(level, "%s: using transport %r; %s", self.url, name, refused)
                    return OpenChannel(name, channel, control, refused)
            refused[name] = reason
        raise TransportRefused(f"no transport to {self.url} works: {refused}, it offers {sorted(offers)}")

    def _control_of(self, transport: str) -> ChannelControl:
        target_device = self.handshake.target.device
        return ChannelControl(
            self._connection, transport, self._lease, device=self._device, target_device=target_device
        )

    def _refusal(self, transport: type[Transport], control: ChannelControl) -> str | None:
        if transport.name not in self.handshake.transports:
            return f"{self.url} does not offer it"
        reason = unusable_reason(transport)
        return transport.auto_refusal(control) if reason is None and self._auto else reason

    def _options(self, transport: type[Transport]) -> Any:
        options = self._transport_options.get(transport.name, {})
        return build_model(transport.options_model, options, f"options of transport {transport.name!r}")

    def _candidates(self, offers: Mapping[str, object]) -> list[type[Transport]]:
        if not self._auto:
            return [self._plugins.transports.get(name) for name in self._transports]
        here = [origin.plugin for origin in self._plugins.transports if origin.plugin.name in offers]
        return sorted(here, key=lambda transport: -transport.rank)


def check_answer(url: str, given: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare an answer's headers, or what came with its tensors, with what was asked for.

    Raises:
        ProtocolError: it is another request's, or of another target or mapping.
    """
    for name, value in expected.items():
        if given.get(name) != value:
            raise ProtocolError(
                f"{url} answered with {name} {given.get(name)!r}, expected {value!r}: "
                "it answered another request, or was restarted with another target"
            )


def check_weights(url: str, tensors: Mapping[str, torch.Tensor], rows: int, hidden_size: int) -> None:
    """Refuse rows of the embedding or the head that are not of this target's sizes: `weight`, and `bias` if any.

    Raises:
        ProtocolError: names the tensor.
    """
    for name, shape in (("weight", (rows, hidden_size)), ("bias", (rows,))):
        found = tensors.get(name)
        if found is None and name == "bias":
            continue
        if found is None or tuple(found.shape) != shape or not found.is_floating_point():
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ProtocolError(f"{url} answered with {name} {got}, expected floats {list(shape)}")


def check_limits(url: str, request: SupervisionRequest, limits: Limits) -> None:
    """Refuse a request that a server said it does not take.

    Raises:
        RequestTooLarge: too many tokens, or too large a body.
    """
    size = 9 * request.tokens + 8 * len(request.seq_lens) + 1024
    if request.tokens > limits.max_request_tokens or size > limits.max_body_bytes:
        raise ProblemType.TOO_MANY_TOKENS.error(
            f"the batch has {request.tokens} tokens, {url} takes {limits.max_request_tokens} and bodies of "
            f"{limits.max_body_bytes} bytes: use a smaller batch, or raise its limits"
        )
