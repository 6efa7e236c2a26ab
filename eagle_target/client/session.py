"""One server with everything agreed: handshake, transport, vocabulary mappings."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from eagle_target.client.lease import GIVE_UP_SECONDS, ChannelControl
from eagle_target.client.timings import received
from eagle_target.contract.runner import DraftHead
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import (
    ConnectError,
    EagleTargetError,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    TransportRefused,
)
from eagle_target.plugins.options import build_model
from eagle_target.plugins.registry import unusable_reason
from eagle_target.protocol import messages
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


@dataclass(slots=True, eq=False)
class Agreement:
    """An open channel.

    refused: why each better transport is not used, by name. users: requests that hold it.
    retired: no further request takes it; it is ended when the last user is done.
    """

    transport: str
    channel: ClientChannel
    control: ChannelControl
    refused: dict[str, str]
    users: int = 0
    retired: bool = False

    def end(self) -> None:
        """Close both ends, as far as the server can be told. Safe to call twice."""
        self.channel.close()
        self.control.give_up()


class Negotiator:
    """Opens channels to one server.

    Args:
        connection: HTTP to it. plugins: where transports come from.
        transports: names in order of preference; `auto` for the best both ends have.
        transport_options: options by transport name. device: where batches go.
    """

    def __init__(
        self,
        connection: ServerConnection,
        *,
        plugins: Plugins,
        transports: Sequence[str],
        transport_options: Mapping[str, Mapping[str, Any]],
        device: str,
    ) -> None:
        self._connection = connection
        self._plugins = plugins
        self._auto = tuple(transports) == AUTO
        self._transports = transports
        self._transport_options = transport_options
        self._device = device

    @property
    def has_choice(self) -> bool:
        """Whether a transport that breaks may be stepped down from."""
        return self._auto or len(self._transports) > 1

    def agree(self, handshake: Handshake, *, without: Collection[str] = ()) -> Agreement:
        """Open a channel on the first transport that works.

        Args:
            handshake: what the server offers. without: transports not to try; they broke just now.

        Raises:
            TransportRefused: none works, with the reason of each.
        """
        refused: dict[str, str] = {}
        for transport in self._candidates(handshake.transports):
            name = transport.name
            control = ChannelControl(self._connection, name, device=self._device, target_device=handshake.target.device)
            if name in without:
                refused[name] = "its channel broke"
                continue
            reason = self._refusal(transport, handshake, control)
            if reason is None:
                try:
                    channel = transport.connect(self._options(transport), handshake.transports[name], control)
                except ConnectError as error:
                    reason = str(error)
                    control.give_up()
                except BaseException:
                    control.give_up()
                    raise
                else:
                    return self._agreed(Agreement(name, channel, control, refused))
            refused[name] = reason
        raise TransportRefused(
            f"no transport to {self._connection.url} works: {refused}, it offers {sorted(handshake.transports)}"
        )

    def _agreed(self, agreement: Agreement) -> Agreement:
        if agreement.refused:
            level = logging.INFO if self._auto else logging.WARNING
            logger.log(
                level, "%s: using transport %r; %s", self._connection.url, agreement.transport, agreement.refused
            )
        return agreement

    def _refusal(self, transport: type[Transport], handshake: Handshake, control: ChannelControl) -> str | None:
        if transport.name not in handshake.transports:
            return f"{self._connection.url} does not offer it"
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
        raise RequestTooLarge(
            f"the batch has {request.tokens} tokens, {url} takes {limits.max_request_tokens} and bodies of "
            f"{limits.max_body_bytes} bytes: use a smaller batch, or raise its limits",
            status=413,
            problem="too-many-tokens",
        )


logger = logging.getLogger(__name__)

# Once for a mapping that a restarted server forgot, once for a channel it forgot, or for one that broke.
REPAIRS = 2
FIRST_RECOVERY_SECONDS = 1.0
LONGEST_RECOVERY_SECONDS = 30.0


class Peer:
    """A server that was shaken hands with.

    Args:
        connection: HTTP to it. plugins: where transports come from.
        transports: names in order of preference; `auto` for the best both ends have.
        transport_options: options by transport name. device: where batches go.
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
        self.connection = connection
        self._plugins = plugins
        self._negotiator = Negotiator(
            connection, plugins=plugins, transports=transports, transport_options=transport_options, device=device
        )
        self._lock = threading.Lock()
        self._handshake: Handshake | None = None
        self._agreement: Agreement | None = None
        self._closed = threading.Event()
        self._recovering = False
        self._uploaded: set[str] = set()
        self.transport = ""
        self.refused: dict[str, str] = {}
        self.fallbacks = 0

    @property
    def url(self) -> str:
        """The server's address."""
        return self.connection.url

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
        """Ask the server what it serves and agree on a transport."""
        self._handshake = messages.read_handshake(self.connection.request_json("GET", messages.TARGET))
        with self._lock:
            if self._agreement is None:
                self._settle(self._negotiator.agree(self._handshake))
        return self._handshake

    def follow(self, handshake: Handshake) -> None:
        """Take for this server's what another serves; it is asked, and held to that, when it is used."""
        with self._lock:
            self._handshake = handshake
            if self._agreement is not None:
                self._retire(self._agreement)
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
        for _ in range(REPAIRS):
            with self._borrow() as agreement:
                try:
                    return self._ask(request, make_sink(), agreement)
                except ServerError as error:
                    if error.problem == "unknown-vocab-mapping" and request.mapping is not None:
                        self._uploaded.discard(request.mapping.sha256)
                    elif error.problem == "unknown-channel":
                        agreement.control.lost = True
                    else:
                        raise
                except ConnectError as error:
                    if not agreement.channel.broken:
                        raise
                    logger.warning("%s: a %s channel broke: %s", self.url, agreement.transport, error)
        with self._borrow() as agreement:
            return self._ask(request, make_sink(), agreement)

    def upload_mapping(self, mapping: VocabMapping) -> None:
        """Give the server a vocabulary mapping, unless it has been given it."""
        if mapping.sha256 not in self._uploaded:
            path = f"{messages.VOCAB_MAPPINGS}/{mapping.sha256}"
            self.connection.request("PUT", path, messages.encode_mapping(mapping)).read_all(0)
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
        """Close the channel and the connections. Safe to call twice."""
        self._closed.set()
        if not self._lock.acquire(timeout=GIVE_UP_SECONDS):
            self.connection.close()  # who has it waits for a server that is silent
            self._lock.acquire()
        agreement, self._agreement = self._agreement, None
        self._lock.release()
        if agreement is not None:
            agreement.end()
        self.connection.close()

    def _ask(self, request: SupervisionRequest, sink: AnySink, agreement: Agreement) -> tuple[AnySink, Received]:
        if request.mapping is not None:
            self.upload_mapping(request.mapping)
        identity = self._identity(messages.request_digest(request))
        headers = {
            messages.REQUEST_ID: identity[messages.REQUEST_ID],
            messages.TRANSPORT: agreement.transport,
        }
        if agreement.control.channel_id is not None:
            headers[messages.CHANNEL] = agreement.control.channel_id
        if agreement.refused:
            headers[messages.PASSED_OVER] = ",".join(agreement.refused)
        body = self.connection.request("POST", messages.SUPERVISION, messages.encode_request(request), headers)
        expected = identity if request.mapping is None else {**identity, messages.MAPPING: request.mapping.sha256}
        try:
            check_answer(self.url, body.headers, expected)
            started = time.perf_counter()
            metadata = agreement.channel.receive(body, sink)
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
        body = self.connection.request(method, path, parts, {messages.REQUEST_ID: identity[messages.REQUEST_ID]})
        check_answer(self.url, body.headers, identity)
        tensors = PackedTensors()
        wire = self._plugins.transports.get("wire")
        control = ChannelControl(self.connection, "wire", device="cpu", target_device=self.handshake.target.device)
        metadata = wire.connect(wire.options_model(), {}, control).receive(body, tensors)
        body.check()
        return tensors, metadata

    @contextmanager
    def _borrow(self) -> Iterator[Agreement]:
        """The agreement, made again where there is none; it is not ended while it is borrowed."""
        with self._lock:
            agreement = self._current()
            agreement.users += 1
        try:
            yield agreement
        finally:
            with self._lock:
                agreement.users -= 1
                if agreement.retired and not agreement.users:
                    agreement.end()

    def _current(self) -> Agreement:
        if self._closed.is_set():
            raise ConnectError(f"the channel to {self.url} is closed")
        if self._agreement is not None and self._agreement.channel.broken:
            self._step_down(self._agreement)
        elif self._agreement is not None and self._agreement.control.lost:
            self._retire(self._agreement)
        if self._agreement is None:
            self._renew_offers()
            self._settle(self._negotiator.agree(self.handshake))
        if self._agreement is None:
            raise ConnectError(f"no channel to {self.url} is open")
        return self._agreement

    def _settle(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self.transport, self.refused = agreement.transport, agreement.refused

    def _retire(self, agreement: Agreement) -> None:
        """Use an agreement for no further request; it ends when nobody uses it any more."""
        agreement.retired = True
        if self._agreement is agreement:
            self._agreement = None
        if not agreement.users:
            agreement.end()

    def _step_down(self, broken: Agreement) -> None:
        """From a channel that broke to the next transport, where there is a choice."""
        present = self._agreement is broken
        self._retire(broken)
        if not present or self._closed.is_set() or not self._negotiator.has_choice:
            return
        logger.warning("%s: transport %r broke and is stepped down from", self.url, broken.transport)
        self._settle(self._negotiator.agree(self.handshake, without={broken.transport}))
        self.fallbacks += 1
        if not self._recovering:
            self._recovering = True
            threading.Thread(target=self._recover, name="eagle-target-recovery", daemon=True).start()

    def _recover(self) -> None:
        """Try for what was stepped down from, until it is there again."""
        pause = FIRST_RECOVERY_SECONDS
        while not self._closed.wait(pause):
            pause = min(2 * pause, LONGEST_RECOVERY_SECONDS)
            try:
                better = self._negotiator.agree(self.handshake)
            except EagleTargetError as error:
                logger.debug("%s: no better transport yet: %s", self.url, error)
                continue
            if self._take_over(better):
                logger.info("%s: back on transport %r", self.url, better.transport)
                return
            better.end()

    def _take_over(self, better: Agreement) -> bool:
        """Use an agreement from now on if it is another transport than the present one."""
        with self._lock:
            present = self._agreement
            if self._closed.is_set() or (present is not None and present.transport == better.transport):
                return False
            self._settle(better)
            self._recovering = False
            if present is not None:
                self._retire(present)
        return True

    def _renew_offers(self) -> None:
        """Ask again what the server offers: it was restarted, and may listen elsewhere now."""
        handshake = messages.read_handshake(self.connection.request_json("GET", messages.TARGET))
        if handshake.fingerprint != self.handshake.fingerprint:
            raise ProtocolError(f"{self.url} serves another target than before, or than the others")
        self._handshake = handshake
