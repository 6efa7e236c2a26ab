"""One server with everything agreed: handshake, transport, vocabulary mappings."""

from __future__ import annotations

import logging
import secrets
import threading
from typing import TYPE_CHECKING, Any

from eagle_target import protocol
from eagle_target.errors import (
    ConnectError,
    EagleTargetError,
    ProtocolError,
    RequestTooLarge,
    ServerError,
    TransportRefused,
)
from eagle_target.options import build_model
from eagle_target.plugins import unusable_reason
from eagle_target.rows import PackedTensors
from eagle_target.runner import DraftHead
from eagle_target.tensor_format import encode_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from eagle_target.client.connection import ResponseBody, ServerConnection
    from eagle_target.plugins import Plugins
    from eagle_target.protocol import Handshake
    from eagle_target.rows import Sink
    from eagle_target.supervision import SupervisionRequest
    from eagle_target.transports import ClientChannel, Transport
    from eagle_target.vocabulary import VocabMapping

logger = logging.getLogger(__name__)

# Once for a mapping the server forgot, once for a channel it forgot: it was restarted.
REPAIRS = 2
# A client that ends does not wait long for a server to hear of it.
GIVE_UP_SECONDS = 2.0


class Peer:
    """A server that was shaken hands with.

    Args:
        connection: HTTP to it. plugins: where transports come from.
        transports: names in order of preference; `auto` for the best both ends have.
        transport_options: options by transport name.
    """

    def __init__(
        self,
        connection: ServerConnection,
        *,
        plugins: Plugins,
        transports: Sequence[str],
        transport_options: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.connection = connection
        self._plugins = plugins
        self._transports = transports
        self._transport_options = transport_options
        self._lock = threading.Lock()
        self._handshake: Handshake | None = None
        self._channel: ClientChannel | None = None
        self._channel_id: str | None = None
        self._closed = False
        self._uploaded: set[str] = set()
        self.transport = ""
        self.refused: dict[str, str] = {}

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
        self._handshake = protocol.read_handshake(self.connection.request_json("GET", protocol.TARGET))
        with self._lock:
            if self._channel is None:
                self._open_channel()
        return self._handshake

    def open_channel(self, transport: str, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have the server accept a channel: the transports' control plane."""
        answer = self.connection.request_json("POST", f"{protocol.TRANSPORTS}/{transport}/channels", hello)
        reply: dict[str, Any] = protocol.read_json_object(answer, "the answer to opening a channel")
        self._channel_id = str(reply.pop("channel", ""))
        return reply

    def supervise(self, request: SupervisionRequest, sink: Sink) -> int:
        """Have a request answered into a sink; uploads what the server has forgotten.

        Returns:
            bytes of the HTTP body.

        Raises:
            RequestTooLarge: more than the server said it takes; nothing was sent.
            ProtocolError: the answer is not to this request, or from another target.
        """
        self._check_limits(request)
        for _ in range(REPAIRS):
            channel, channel_id = self._agreed_channel()
            try:
                return self._ask(request, sink, channel, channel_id)
            except ServerError as error:
                if error.problem == "unknown-vocab-mapping" and request.mapping is not None:
                    self._uploaded.discard(request.mapping.sha256)
                elif error.problem == "unknown-channel":
                    self._drop_channel(channel)
                else:
                    raise
        return self._ask(request, sink, *self._agreed_channel())

    def upload_mapping(self, mapping: VocabMapping) -> None:
        """Give the server a vocabulary mapping, unless it has been given it."""
        if mapping.sha256 not in self._uploaded:
            path = f"{protocol.VOCAB_MAPPINGS}/{mapping.sha256}"
            self.connection.request("PUT", path, protocol.encode_mapping(mapping)).read_all(0)
            self._uploaded.add(mapping.sha256)

    def fetch_input_embedding(self) -> torch.Tensor:
        """The target's input embedding `[vocab, hidden]`."""
        tensors, _ = self._fetch(self.connection.request("GET", protocol.INPUT_EMBEDDINGS))
        return tensors["weight"]

    def fetch_draft_head(self, mapping: VocabMapping) -> DraftHead:
        """The mapping's rows of the LM head."""
        parts = encode_tensors({"token_ids": mapping.selected_token_ids}, {})
        tensors, metadata = self._fetch(self.connection.request("POST", protocol.LM_HEAD, parts))
        soft_cap = metadata.get("soft_cap", "")
        return DraftHead(
            weight=tensors["weight"],
            bias=tensors.get("bias"),
            logit_scale=float(metadata.get("logit_scale", "1.0")),
            soft_cap=float(soft_cap) if soft_cap else None,
        )

    def close(self) -> None:
        """Close the channel and the connections. Safe to call twice."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
            channel_id, self._channel_id = self._channel_id, None
        if channel is not None:
            channel.close()
        if channel_id is not None:
            self._give_up_channel(self.transport, channel_id)
        self.connection.close()

    def _ask(self, request: SupervisionRequest, sink: Sink, channel: ClientChannel, channel_id: str | None) -> int:
        if request.mapping is not None:
            self.upload_mapping(request.mapping)
        request_id = secrets.token_hex(8)
        headers = {protocol.REQUEST_ID: request_id, protocol.TRANSPORT: self.transport}
        if channel_id is not None:
            headers[protocol.CHANNEL] = channel_id
        body = self.connection.request("POST", protocol.SUPERVISION, protocol.encode_request(request), headers)
        try:
            self._check_answer(body, request, request_id)
            channel.receive(body, sink)
        finally:
            body.close()
        return body.length

    def _check_answer(self, body: ResponseBody, request: SupervisionRequest, request_id: str) -> None:
        expected = {protocol.REQUEST_ID: request_id, protocol.FINGERPRINT: self.handshake.fingerprint}
        if request.mapping is not None:
            expected[protocol.MAPPING] = request.mapping.sha256
        for name, value in expected.items():
            if body.headers.get(name) != value:
                raise ProtocolError(
                    f"{self.url} answered with {name} {body.headers.get(name)!r}, expected {value!r}: "
                    "was it restarted with another target?"
                )

    def _check_limits(self, request: SupervisionRequest) -> None:
        limits = self.handshake.limits
        size = 9 * request.tokens + 8 * len(request.seq_lens) + 1024
        if request.tokens > limits.max_request_tokens or size > limits.max_body_bytes:
            raise RequestTooLarge(
                f"the batch has {request.tokens} tokens, {self.url} takes {limits.max_request_tokens} and bodies of "
                f"{limits.max_body_bytes} bytes: use a smaller batch, or raise its limits",
                status=413,
                problem="too-many-tokens",
            )

    def _fetch(self, body: ResponseBody) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors = PackedTensors()
        wire = self._plugins.transports.get("wire")
        metadata = wire.connect(wire.options_model(), {}, self).receive(body, tensors)
        return tensors, metadata

    def _agreed_channel(self) -> tuple[ClientChannel, str | None]:
        """The channel and its id, opened again where the server forgot it."""
        with self._lock:
            if self._closed:
                raise ConnectError(f"the channel to {self.url} is closed")
            if self._channel is None:
                self._renew_offers()
                self._open_channel()
            if self._channel is None:
                raise ConnectError(f"no channel to {self.url} is open")
            return self._channel, self._channel_id

    def _drop_channel(self, forgotten: ClientChannel) -> None:
        """Let go of a channel the server forgot, unless another thread did."""
        with self._lock:
            if self._channel is forgotten:
                self._channel = self._channel_id = None
        forgotten.close()

    def _renew_offers(self) -> None:
        """Ask again what the server offers: it was restarted, and may listen elsewhere now."""
        handshake = protocol.read_handshake(self.connection.request_json("GET", protocol.TARGET))
        if handshake.fingerprint != self.handshake.fingerprint:
            raise ProtocolError(f"{self.url} serves another target than before: connect again")
        self._handshake = handshake

    def _give_up_channel(self, transport: str, channel_id: str) -> None:
        path = f"{protocol.TRANSPORTS}/{transport}/channels/{channel_id}"
        try:
            self.connection.request("DELETE", path, timeout=GIVE_UP_SECONDS)
        except EagleTargetError as error:
            logger.debug("channel %s of %s was not closed: %s", channel_id, self.url, error)

    def _open_channel(self) -> None:
        offers = self.handshake.transports
        auto = list(self._transports) == ["auto"]
        self.refused = {}
        for transport in self._candidates(offers, auto=auto):
            reason = None if transport.name in offers else f"{self.url} does not offer it"
            reason = reason or unusable_reason(transport)
            if reason is None:
                options = self._transport_options.get(transport.name, {})
                checked = build_model(transport.options_model, options, f"options of transport {transport.name!r}")
                try:
                    self._channel = transport.connect(checked, offers[transport.name], self)
                except ConnectError as error:
                    reason = str(error)
                    accepted, self._channel_id = self._channel_id, None
                    if accepted is not None:
                        self._give_up_channel(transport.name, accepted)
                else:
                    self.transport = transport.name
                    break
            self.refused[transport.name] = reason
        if self._channel is None:
            raise TransportRefused(f"no transport to {self.url} works: {self.refused}, it offers {sorted(offers)}")
        if self.refused:
            level = logging.INFO if auto else logging.WARNING
            logger.log(level, "%s: using transport %r; %s", self.url, self.transport, self.refused)

    def _candidates(self, offers: Mapping[str, object], *, auto: bool) -> list[type[Transport]]:
        if not auto:
            return [self._plugins.transports.get(name) for name in self._transports]
        here = [origin.plugin for origin in self._plugins.transports if origin.plugin.name in offers]
        return sorted(here, key=lambda transport: -transport.rank)
