"""The target on other machines: the same batches, from one server or many."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from eagle_target.auth import open_access
from eagle_target.backend import BatchForm, RequestingBackend
from eagle_target.client.balancer import Balancer
from eagle_target.client.connecting import connect_servers
from eagle_target.client.http import ServerConnection
from eagle_target.client.session import ServerSession
from eagle_target.client.timings import Traffic
from eagle_target.compute.assembly import StagedSink
from eagle_target.config import ClientConfig
from eagle_target.contract.model_info import describe_target
from eagle_target.contract.request import bytes_per_token
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.devices import resolve_device
from eagle_target.errors import ConfigError, ConnectError
from eagle_target.memory import BufferPool, PinnedPool
from eagle_target.plugins.options import build_model
from eagle_target.plugins.registry import load_plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.client.timings import Received
    from eagle_target.compute.layout import TrainerRows
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.model_info import ModelInfo
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import DraftHead

WORKERS_PER_SERVER = 4
# Longer than most steps take, for pinned memory that the next batch needs again is worth keeping.
STAGING_IDLE_SECONDS = 60.0


class Answered(NamedTuple):
    """What came of one attempt. assembly: seconds from the last byte to the finished batch."""

    batch: Eagle3TargetBatch
    received: Received
    assembly: float


class RemoteEagle3TargetModel(RequestingBackend):
    """Supervision from one or more servers. Build it with `from_urls` or `from_config`; any thread may use it."""

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
    def from_config(cls, config: ClientConfig) -> Self:
        """Connect to the servers of a client's settings, wait for those still loading, check that they serve the same.

        Args:
            config: `model` and what goes with it are for a target in this process: `open_target` takes either.

        Raises:
            ConfigError: no or wrong urls or options, a model beside them, or no such device.
            ConnectError: a server cannot be reached or is not ready in time.
            ContractError: the servers differ, with what differs; or they cannot answer in this encoding.
            VocabMappingError: the vocabulary mapping is invalid or for another target.
        """
        if not config.urls or config.model:
            raise ConfigError(
                f"urls must be a list of at least one server, and no model beside it, got urls={list(config.urls)}, "
                f"model={config.model!r}"
            )
        # Other threads' current device is another one.
        device = resolve_device(config.device)
        plugins, access, client_id = load_plugins(), open_access(config), secrets.token_hex(8)
        sessions = [
            ServerSession(
                ServerConnection(
                    url,
                    timeout=config.timeout,
                    max_connections=WORKERS_PER_SERVER,
                    client_id=client_id,
                    access=access,
                    checksum=config.checksum,
                ),
                plugins=plugins,
                transports=[name.strip() for name in config.transport.split(",")],
                transport_options=config.transport_options,
                device=str(device),
            )
            for url in dict.fromkeys(url.rstrip("/") for url in config.urls)
        ]
        with ExitStack() as undone:
            for session in sessions:
                undone.callback(session.close)
            encoding, left_out = connect_servers(
                sessions, config.encoding, ready_timeout=config.ready_timeout, min_servers=config.min_servers
            )
            balancer = Balancer(
                sessions,
                max_retries=config.max_retries,
                timeout=config.timeout,
                retry_timeout=config.retry_timeout,
            )
            for server in balancer.servers:
                if server.session in left_out:
                    server.fail(left_out[server.session])
            target = cls(balancer, BatchForm(encoding, config.rows, getattr(torch, config.probs_dtype), device))
            undone.callback(target.close)
            if config.vocab_mapping is not None:
                target.set_vocab_mapping(VocabMapping.from_file(config.vocab_mapping))
            undone.pop_all()
        return target

    @classmethod
    def from_urls(cls, urls: Sequence[str], **settings: Any) -> Self:
        """`from_config` with these urls, and other settings of `ClientConfig` by name.

        Args:
            urls: `http://host:port` or `https://host:port` each.
            settings: see docs/configuration.md; None is the default. `device` may be a `torch.device`, `probs_dtype` a
                `torch.dtype`.

        Raises:
            ConfigError: an unknown setting, with the nearest name, or a wrong value; and as `from_config` does.
        """
        if isinstance(urls, str):
            raise ConfigError(f"urls must be a list of at least one server, got {urls!r}")
        given = {name: value for name, value in settings.items() if value is not None}
        for name in ("device", "probs_dtype"):
            if name in given:
                given[name] = str(given[name]).removeprefix("torch.")
        return cls.from_config(build_model(ClientConfig, {"urls": tuple(urls), **given}, "client settings"))

    def model_info(self) -> ModelInfo:
        """Facts about the target, each server's health and transport, what has travelled and where its time went."""
        mapping = self._vocabulary.mapping
        encodings = self._balancer.servers[0].session.handshake.encodings
        return {
            **describe_target(self.info, self._aux_layer_ids, self._fingerprint, self.form.encoding),
            "bytes_per_token": bytes_per_token(
                self.info, encodings, None if mapping is None else mapping.draft_vocab_size
            ),
            "servers": [server.describe() for server in self._balancer.servers],
            "traffic": self._traffic.totals(retries=self._balancer.retries),
        }

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
