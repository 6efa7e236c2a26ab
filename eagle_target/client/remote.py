"""The target on other machines: the same batches, from one server or many."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

import torch

from eagle_target.auth import open_access
from eagle_target.backend import BatchForm, RequestingBackend
from eagle_target.client.balancer import Balancer
from eagle_target.client.connecting import connect_servers
from eagle_target.client.http import ServerConnection
from eagle_target.client.session import ServerSession
from eagle_target.client.timings import Traffic
from eagle_target.compute.assembly import StagedSink
from eagle_target.contract.request import PROBS_DTYPES, Encoding, RowPolicy, bytes_per_token
from eagle_target.devices import resolve_device
from eagle_target.errors import ConfigError, ConnectError
from eagle_target.memory import BufferPool, PinnedPool
from eagle_target.plugins.registry import load_plugins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from eagle_target.client.timings import Received
    from eagle_target.compute.layout import TrainerRows
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import DraftHead
    from eagle_target.contract.vocab_mapping import VocabMapping

WORKERS_PER_SERVER = 4
# Longer than most steps take, for pinned memory that the next batch needs again is worth keeping.
STAGING_IDLE_SECONDS = 60.0


class Answered(NamedTuple):
    """What came of one attempt. assembly: seconds from the last byte to the finished batch."""

    batch: Eagle3TargetBatch
    received: Received
    assembly: float


class RemoteEagle3TargetModel(RequestingBackend):
    """Supervision from one or more servers. Build it with `from_urls`; safe to use from several threads."""

    def __init__(self, balancer: Balancer, form: BatchForm) -> None:
        first = balancer.servers[0].session.handshake
        super().__init__(first.target, form, workers=WORKERS_PER_SERVER * len(balancer.servers))
        self._balancer = balancer
        self._fingerprint = first.fingerprint
        self._aux_layer_ids = first.aux_layer_ids
        self._buffers = BufferPool()
        self._staging = PinnedPool(form.device) if form.device.type == "cuda" else BufferPool()
        self._traffic = Traffic()

    @classmethod
    def from_urls(
        cls,
        urls: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        token: str | None = None,
        token_file: Path | str | None = None,
        ca_file: Path | str | None = None,
        client_cert: Path | str | None = None,
        client_key: Path | str | None = None,
        checksum: bool = True,
        transport: str = "auto",
        transport_options: Mapping[str, Mapping[str, Any]] | None = None,
        encoding: Encoding | Literal["auto"] = "auto",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        timeout: float = 120.0,
        max_retries: int = 3,
        retry_timeout: float = 60.0,
        ready_timeout: float = 600.0,
        min_servers: int | None = None,
    ) -> Self:
        """Connect to servers, wait for those still loading, and check that they serve the same.

        Args:
            urls: `http://host:port` or `https://host:port` each.
            device: where batches go; `cuda` is the calling thread's current device.
            token, token_file: the token to send, or a file with it; where neither is given, the variables
                EAGLE_TARGET_TOKEN and EAGLE_TARGET_TOKEN_FILE hold.
            ca_file: authorities that https servers are checked against; default the system's.
            client_cert, client_key: this client's certificate, for servers that ask for one.
            checksum: whether each answer's body is checked against a checksum.
            transport: `auto` for the best both ends have; a name; or names in order of preference, comma-separated.
            transport_options: options by transport name.
            encoding: `probs`, `hidden` or `logits`; `auto` is `hidden` where every server hands its head out, else
                `probs`. See `answer_size` for the bytes of each.
            rows: `supervised` or `all`.
            probs_dtype: float32, bfloat16 or float16.
            timeout: seconds one attempt may take.
            max_retries: further attempts after a failed one, on another server where there is one.
            retry_timeout: seconds from its first failure for which a batch is asked for again beyond `max_retries`,
                while no server can be reached.
            ready_timeout: seconds to wait for a server that is still loading.
            min_servers: how many servers must be ready and serve the same to begin with; default all. Others are left
                out until they do: the first server of the list that is ready says what is served.

        Raises:
            ConfigError: no or wrong URLs or options, or no such device. ConnectError: a server cannot be reached or is
                not ready in time.
            ContractError: the servers differ, with what differs; or they cannot answer in this encoding.
        """
        if isinstance(urls, str) or not urls:
            raise ConfigError(f"urls must be a list of at least one server, got {urls!r}")
        if rows not in get_args(RowPolicy) or probs_dtype not in PROBS_DTYPES:
            raise ConfigError(f"rows must be supervised or all, probs_dtype a float, got {rows!r} and {probs_dtype}")
        # Other threads' current device is another one.
        batch_device = resolve_device(device)
        plugins = load_plugins()
        client_id = secrets.token_hex(8)
        access = open_access(
            token=token, token_file=token_file, ca_file=ca_file, client_cert=client_cert, client_key=client_key
        )
        sessions = [
            ServerSession(
                ServerConnection(
                    url,
                    timeout=timeout,
                    max_connections=WORKERS_PER_SERVER,
                    client_id=client_id,
                    access=access,
                    checksum=checksum,
                ),
                plugins=plugins,
                transports=[name.strip() for name in transport.split(",")],
                transport_options=transport_options or {},
                device=str(batch_device),
            )
            for url in dict.fromkeys(url.rstrip("/") for url in urls)
        ]
        try:
            chosen, left_out = connect_servers(sessions, encoding, ready_timeout=ready_timeout, min_servers=min_servers)
        except BaseException:
            for session in sessions:
                session.close()
            raise
        balancer = Balancer(sessions, max_retries=max_retries, timeout=timeout, retry_timeout=retry_timeout)
        for server in balancer.servers:
            if server.session in left_out:
                server.fail(left_out[server.session])
        return cls(balancer, BatchForm(chosen, rows, probs_dtype, batch_device))

    def model_info(self) -> dict[str, Any]:
        """Facts about the target, each server's health and transport, what has travelled and where its time went."""
        return {
            **self.info.model_dump(mode="json"),
            "aux_layer_ids": list(self._aux_layer_ids),
            "fingerprint": self._fingerprint,
            "encoding": self.form.encoding,
            "bytes_per_token": self._bytes_per_token(),
            "servers": [
                {
                    "url": server.session.url,
                    "transport": server.session.transport,
                    "transports_refused": dict(server.session.refused),
                    "fallbacks": server.session.fallbacks,
                    **server.describe(),
                }
                for server in self._balancer.servers
            ],
            "traffic": {**self._traffic.totals(), "retries": self._balancer.retries},
        }

    def _bytes_per_token(self) -> dict[str, int]:
        mapping = self._vocabulary.mapping
        encodings = self._balancer.servers[0].session.handshake.encodings
        return bytes_per_token(self.info, encodings, None if mapping is None else mapping.draft_vocab_size)

    def input_embedding_weight(self) -> torch.Tensor:
        """See `Eagle3TargetBackend.input_embedding_weight`; fetched at each call, so keep it."""
        self._check_open()
        return self._balancer.run(lambda session: session.fetch_input_embedding()).to(self.form.device)

    def _answer(self, rows: TrainerRows, request: SupervisionRequest, head: DraftHead | None) -> Eagle3TargetBatch:
        answered = self._balancer.run(lambda session: self._ask(session, rows, request, head))
        self._traffic.count(request.tokens, answered.received, answered.assembly)
        return answered.batch

    def _ask(
        self, session: ServerSession, rows: TrainerRows, request: SupervisionRequest, head: DraftHead | None
    ) -> Answered:
        def make_sink() -> StagedSink:
            return StagedSink(self._assembler(rows, request, head), self.form.device, self._staging.allocate)

        sink, received = session.supervise(request, make_sink)
        started = time.perf_counter()
        with torch.no_grad():
            batch = sink.finish()
        self._staging.trim(STAGING_IDLE_SECONDS)
        return Answered(batch, received, time.perf_counter() - started)

    def _fetch_draft_head(self, mapping: VocabMapping) -> DraftHead:
        return self._balancer.run(lambda session: session.fetch_draft_head(mapping))

    def _share_mapping(self, mapping: VocabMapping) -> None:
        # One server that takes it will do: the others get it with their first request, when they are up.
        self._balancer.run(lambda session: session.upload_mapping(mapping))

    def _closed_error(self) -> ConnectError:
        return ConnectError("this client is closed: build a new one")

    def _interrupt(self) -> None:
        self._balancer.stop()
        for server in self._balancer.servers:
            server.session.close()

    def _release(self) -> None:
        self._buffers.close()
        self._staging.close()

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.form.device.type == "cpu":
            return self._buffers.allocate(shape, dtype)
        return super()._allocate(shape, dtype)
