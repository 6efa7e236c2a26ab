"""The HTTP routes of a server. docs/protocol.md describes each."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from eagle_target.contract.request import bytes_per_token
from eagle_target.errors import ContractError, EagleTargetError, VocabMappingError
from eagle_target.plugins.transport import Reply
from eagle_target.protocol import messages
from eagle_target.protocol.problems import ProblemType
from eagle_target.protocol.tensors import decode_tensors, encode_tensors
from eagle_target.server import metrics
from eagle_target.server.bodies import (
    CheckedJson,
    FollowedResponse,
    TensorResponse,
    checksum_headers,
    read_body,
    wait_for_answer,
)
from eagle_target.server.clients import MAX_CLIENT_LETTERS
from eagle_target.server.http_limits import check_size, read_mapping_body
from eagle_target.server.middleware import AUTHORIZED, address_of, own_address_of
from eagle_target.server.problems import (
    RECORD,
    Problem,
    answer_http_error,
    answer_nobody,
    answer_problem,
    problem,
    problem_of,
)
from eagle_target.server.status.page import StatusPage

if TYPE_CHECKING:
    from eagle_target.config import ServerConfig
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.plugins.transport import ServerChannel
    from eagle_target.server.channels import Channels
    from eagle_target.server.engine.answer import Answer
    from eagle_target.server.engine.server import TargetModelServer
    from eagle_target.server.middleware import RequestRecord

MAX_HELLO_BYTES = 1 << 16


class TargetApp:
    """Routes over one `TargetModelServer`; `asgi` is the application."""

    def __init__(self, server: TargetModelServer, channels: Channels, config: ServerConfig) -> None:
        self.server = server
        self.channels = channels
        self.config = config
        self.active = 0
        self.metrics = metrics.Metrics(server, channels)
        page = StatusPage(server, channels, self.metrics, config)
        self.asgi = Starlette(
            routes=[
                Route(messages.STATUS, page.show),
                Route(messages.HEALTH, self.health),
                Route(messages.READY, self.ready),
                Route(messages.METRICS, self.show_metrics),
                Route(messages.TARGET, self.handshake),
                Route(messages.INPUT_EMBEDDINGS, self.input_embeddings),
                Route(messages.LM_HEAD, self.lm_head, methods=["POST"]),
                Route(messages.VOCAB_MAPPINGS + "/{sha256}", self.show_mapping),
                Route(messages.VOCAB_MAPPINGS + "/{sha256}", self.put_mapping, methods=["PUT"]),
                Route(messages.SUPERVISION, self.supervise, methods=["POST"]),
                Route(messages.TRANSPORTS + "/{name}/channels", self.open_channel, methods=["POST"]),
                Route(messages.TRANSPORTS + "/{name}/channels/{channel}", self.renew_channel, methods=["PUT"]),
                Route(messages.TRANSPORTS + "/{name}/channels/{channel}", self.close_channel, methods=["DELETE"]),
                Route(messages.TRANSPORTS + "/{name}/channels/{channel}/messages", self.tell_channel, methods=["POST"]),
                Route(messages.CLIENTS + "/{client}", self.renew_client, methods=["PUT"]),
                Route(messages.CLIENTS + "/{client}", self.dismiss_client, methods=["DELETE"]),
            ],
            exception_handlers={
                EagleTargetError: answer_problem,
                ClientDisconnect: answer_nobody,
                HTTPException: answer_http_error,
                Exception: answer_problem,
            },
        )

    def note_record(self, record: RequestRecord) -> None:
        """Count what a request that is over came to."""
        # A probe that is told `loading` is no error.
        if record.problem and record.path != messages.READY:
            self.metrics.count_problem(record.problem, record.status)

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """The process is alive."""
        return CheckedJson({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        """The engine is loaded and answers."""
        state, failure = self.server.state, self.server.failure
        if state == "ready":
            return CheckedJson({"status": state})
        # Strangers may ask, and a failure's message names files.
        detail = f"the server is {state}" + (f": {failure}" if failure and request.scope.get(AUTHORIZED) else "")
        return problem(ProblemType.named(state), detail, retry_after=1.0)

    async def show_metrics(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """Prometheus."""
        return Response(self.metrics.render(), media_type=metrics.CONTENT_TYPE)

    async def handshake(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        """What is served, and how."""
        served, config = self.server.served, self.config
        answer = messages.Handshake(
            server_version=importlib.metadata.version("eagle-target"),
            target=served.info,
            aux_layer_ids=served.aux_layer_ids,
            fingerprint=served.fingerprint,
            encodings=self.server.encodings,
            bytes_per_token=bytes_per_token(served.info, self.server.encodings, None),
            transports=self.channels.offers(),
            limits=messages.Limits(
                max_body_bytes=config.max_body_bytes,
                max_request_tokens=config.max_request_tokens,
                max_batch_tokens=config.max_batch_tokens,
                max_queue=config.max_queue,
            ),
        )
        return CheckedJson(answer.model_dump(mode="json"))

    async def input_embeddings(self, request: Request) -> Response:
        """The input embedding as `weight`."""
        weight = await asyncio.wrap_future(self.server.input_embedding_weight())
        return await self._stream(request, {"weight": weight}, {}, answered="")

    async def lm_head(self, request: Request) -> Response:
        """Rows of the LM head for `token_ids`."""
        tensors, _ = decode_tensors(await self._read(request))
        token_ids = tensors.get("token_ids")
        vocab_size = self.server.served.info.vocab_size
        if token_ids is None or token_ids.dtype != torch.int64 or token_ids.dim() != 1 or not len(token_ids):
            raise ContractError("the request needs token_ids as a non-empty int64 vector")
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size or len(token_ids) > vocab_size:
            raise ContractError(f"token_ids must be at most {vocab_size} ids of 0 to {vocab_size - 1}")
        head = await asyncio.wrap_future(self.server.draft_head(token_ids))
        if head is None:
            raise ContractError("this target's LM head cannot be handed out: use encoding 'probs' or 'logits'")
        parts = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        soft_cap = "" if head.soft_cap is None else repr(head.soft_cap)
        metadata = {"logit_scale": repr(head.logit_scale), "soft_cap": soft_cap}
        return await self._stream(request, parts, metadata, answered=messages.head_digest(token_ids))

    async def show_mapping(self, request: Request) -> Response:
        """What a mapping that was given makes of a token, by encoding."""
        mapping = self._find_mapping(request.path_params["sha256"])
        sizes = bytes_per_token(self.server.served.info, self.server.encodings, mapping.draft_vocab_size)
        return CheckedJson({"draft_vocab_size": mapping.draft_vocab_size, "bytes_per_token": sizes})

    async def put_mapping(self, request: Request) -> Response:
        """Keep a vocabulary mapping under its hash."""
        mapping = messages.decode_mapping(await read_mapping_body(request, self.config))
        if request.path_params["sha256"] != mapping.sha256:
            raise VocabMappingError(
                f"the mapping's hash is {mapping.sha256}, the path says {request.path_params['sha256'][:64]!r}"
            )
        self.server.add_mapping(mapping)
        return Response(status_code=204)

    async def supervise(self, request: Request) -> Response:
        """Supervision for one request, over the transport it names."""
        self.active += 1
        record: RequestRecord = request.scope[RECORD]
        try:
            response = await self._answer(request)
        except BaseException:
            self.active -= 1
            raise
        outcome = response.name if isinstance(response, Problem) else metrics.ANSWERED
        self.metrics.count_request(outcome, response.status_code)
        return FollowedResponse(response, partial(self._end, record))

    async def open_channel(self, request: Request) -> Response:
        """Open a channel on a transport."""
        body = await read_body(request, limit=MAX_HELLO_BYTES, timeout=self.config.body_timeout)
        hello = messages.read_json_object(bytes(body) or b"{}", "the channel's hello")
        opening = partial(self.channels.open, request.path_params["name"], hello)
        channel, answer = await run_in_threadpool(opening, reached_at=own_address_of(request.scope))
        return CheckedJson({**answer, "channel": channel}, status_code=201)

    async def renew_channel(self, request: Request) -> Response:
        """The client of a channel is alive."""
        self.channels.find(request.path_params["name"], request.path_params["channel"])
        return Response(status_code=204)

    async def tell_channel(self, request: Request) -> Response:
        """A message from the client's end of a channel to the server's."""
        channel = self.channels.find(request.path_params["name"], request.path_params["channel"])
        body = await read_body(request, limit=MAX_HELLO_BYTES, timeout=self.config.body_timeout)
        message = messages.read_json_object(bytes(body), "the channel's message")
        return CheckedJson(await run_in_threadpool(channel.answer, message))

    async def close_channel(self, request: Request) -> Response:
        """Close a channel."""
        name, channel = request.path_params["name"], request.path_params["channel"]
        await run_in_threadpool(self.channels.close_channel, name, channel)
        return Response(status_code=204)

    async def renew_client(self, request: Request) -> Response:
        """A client is there."""
        clients = self.server.clients
        clients.hear(request.path_params["client"][:MAX_CLIENT_LETTERS], address_of(request.scope))
        return CheckedJson({"lease_seconds": clients.lease})

    async def dismiss_client(self, request: Request) -> Response:
        """A client leaves."""
        self.server.clients.leave(request.path_params["client"][:MAX_CLIENT_LETTERS])
        return Response(status_code=204)

    def _end(self, record: RequestRecord) -> None:
        self.active -= 1
        self.metrics.count_seconds(record.seconds)

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._supervise(request)
        except ClientDisconnect:
            return problem(ProblemType.CLIENT_GONE, "the client went away")
        except asyncio.CancelledError:
            # Only a server that stops at once cancels a request; the event loop still sends what is small.
            return problem(ProblemType.CLOSED, "the server stopped before this request was answered", close=True)
        except Exception as error:  # noqa: BLE001 - answered as a problem
            return problem_of(error)

    async def _supervise(self, request: Request) -> Response:
        name = request.headers.get(messages.TRANSPORT, "wire")
        channel = self.channels.find(name, request.headers.get(messages.CHANNEL))
        record: RequestRecord = request.scope[RECORD]
        body = await self._read(request)
        self.metrics.count_received(len(body))
        read_seconds = record.seconds
        supervision_request = messages.decode_request(body, self._find_mapping)
        check_size(supervision_request, self.config)
        client = record.client_id[:MAX_CLIENT_LETTERS]
        future = self.server.submit(supervision_request, channel.new_tensors, client=client)
        answer = await wait_for_answer(future, request)
        try:
            return await self._send(request, supervision_request, answer, channel, read_seconds=read_seconds)
        except BaseException:
            answer.release()
            raise

    async def _send(
        self,
        request: Request,
        asked: SupervisionRequest,
        answer: Answer,
        channel: ServerChannel,
        *,
        read_seconds: float,
    ) -> Response:
        """The response that sends an answer, and releases it."""
        answered_at = time.perf_counter()
        record: RequestRecord = request.scope[RECORD]
        name, client = request.headers.get(messages.TRANSPORT, "wire"), record.client_id[:MAX_CLIENT_LETTERS]
        headers = self._headers(record.request_id, asked, answer)
        metadata = {name: value for name, value in headers.items() if name != messages.TIMINGS}
        reply = await run_in_threadpool(channel.send, record.request_id, answer.tensors, metadata)
        headers |= await checksum_headers(request, reply)
        if reply.moved_bytes:
            headers[messages.MOVED_BYTES] = str(reply.moved_bytes)
        self.metrics.count_supervision(
            tokens=asked.tokens,
            transport=name,
            sent_bytes=reply.length + reply.moved_bytes,
            timings={"read": read_seconds, **answer.timings},
        )
        self.metrics.count_transport(client, name, request.headers.get(messages.PASSED_OVER, ""))
        self.server.clients.supervised(client, tokens=asked.tokens, transport=name)
        record.fields |= {"tokens": asked.tokens, "transport": name}
        return TensorResponse(
            reply,
            headers,
            send_timeout=self.config.send_timeout,
            answer=answer,
            on_sent=lambda: self.metrics.count_stage("send", time.perf_counter() - answered_at),
        )

    def _headers(self, request_id: str, request: SupervisionRequest, answer: Answer) -> dict[str, str]:
        stages = (f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in answer.timings.items())
        headers = {
            **self._identity(request_id, messages.request_digest(request)),
            messages.TIMINGS: ", ".join(stages),
        }
        return headers if request.mapping is None else {**headers, messages.MAPPING: request.mapping.sha256}

    def _identity(self, request_id: str, answered: str) -> dict[str, str]:
        """What an answer says of itself: whose it is, to what, and of which target."""
        return {
            messages.REQUEST_ID: request_id,
            messages.ANSWERED: answered,
            messages.FINGERPRINT: self.server.served.fingerprint,
        }

    def _find_mapping(self, sha256: str) -> VocabMapping:
        try:
            return self.server.find_mapping(sha256)
        except VocabMappingError as error:
            raise ProblemType.UNKNOWN_VOCAB_MAPPING.error(str(error)) from error

    async def _read(self, request: Request) -> memoryview:
        return await read_body(request, limit=self.config.max_body_bytes, timeout=self.config.body_timeout)

    async def _stream(
        self, request: Request, tensors: dict[str, torch.Tensor], metadata: dict[str, str], *, answered: str
    ) -> Response:
        # Tensors on a device are copied first, which other requests need not wait for.
        reply = Reply(messages.CONTENT_TYPE, await run_in_threadpool(encode_tensors, tensors, metadata))
        identity = self._identity(request.scope[RECORD].request_id, answered)
        headers = {**identity, **await checksum_headers(request, reply)}
        return TensorResponse(reply, headers, send_timeout=self.config.send_timeout)
