"""The target on other machines: the same batches, from one server or many."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, get_args

import torch

from eagle_target.assembly import BatchAssembler, read_trainer_rows
from eagle_target.backend import Eagle3TargetBackend
from eagle_target.client.buffers import BufferPool
from eagle_target.client.connecting import check_agreement, wait_for_handshakes
from eagle_target.client.connection import ServerConnection
from eagle_target.client.dispatch import Dispatcher
from eagle_target.client.peer import Peer
from eagle_target.client.staging import StagedSink
from eagle_target.errors import ConfigError, ConnectError, ContractError
from eagle_target.plugins import load_plugins
from eagle_target.projection import PROBS_DTYPES, Encoding, RowPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.assembly import TrainerRows
    from eagle_target.batch import Eagle3TargetBatch
    from eagle_target.rows import Sink
    from eagle_target.runner import DraftHead
    from eagle_target.sequences import SeqLens
    from eagle_target.supervision import SupervisionRequest
    from eagle_target.vocabulary import VocabMapping

WORKERS_PER_SERVER = 4


class RemoteEagle3TargetModel(Eagle3TargetBackend):
    """Supervision from one or more servers. Build it with `from_urls`; safe to use from several threads."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        device: torch.device,
        encoding: Encoding,
        rows: RowPolicy,
        probs_dtype: torch.dtype,
    ) -> None:
        self._dispatcher = dispatcher
        self._device = device
        self._encoding: Encoding = encoding
        self._rows: RowPolicy = rows
        self._probs_dtype = probs_dtype
        first = dispatcher.standings[0].peer.handshake
        self._info = first.target
        self._fingerprint = first.fingerprint
        self._aux_layer_ids = first.aux_layer_ids
        self._mapping: VocabMapping | None = None
        self._draft_head: DraftHead | None = None
        self._buffers = BufferPool()
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._traffic = {"requests": 0, "tokens": 0, "bytes_received": 0}

    @classmethod
    def from_urls(
        cls,
        urls: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        transport: str = "auto",
        transport_options: Mapping[str, Mapping[str, Any]] | None = None,
        encoding: Encoding = "probs",
        rows: RowPolicy = "supervised",
        probs_dtype: torch.dtype = torch.float32,
        timeout: float = 120.0,
        max_retries: int = 3,
        ready_timeout: float = 600.0,
    ) -> Self:
        """Connect to servers, wait for those still loading, and check that they serve the same.

        Args:
            urls: `http://host:port` each.
            device: where batches go.
            transport: `auto` for the best both ends have; a name; or names in order of preference, comma-separated.
            transport_options: options by transport name.
            encoding: `probs`, `hidden` or `logits`.
            rows: `supervised` or `all`.
            probs_dtype: float32, bfloat16 or float16.
            timeout: seconds one attempt may take.
            max_retries: further attempts after a failed one, on another server where there is one.
            ready_timeout: seconds to wait for a server that is still loading.

        Raises:
            ConfigError: no or wrong URLs or options. ConnectError: a server cannot be reached or is not ready in time.
            ContractError: the servers differ, with what differs; or they cannot answer in this encoding.
        """
        if isinstance(urls, str) or not urls:
            raise ConfigError(f"urls must be a list of at least one server, got {urls!r}")
        if rows not in get_args(RowPolicy) or probs_dtype not in PROBS_DTYPES:
            raise ConfigError(f"rows must be supervised or all, probs_dtype a float, got {rows!r} and {probs_dtype}")
        plugins = load_plugins()
        peers = [
            Peer(
                ServerConnection(url, timeout=timeout, max_connections=WORKERS_PER_SERVER),
                plugins=plugins,
                transports=[name.strip() for name in transport.split(",")],
                transport_options=transport_options or {},
            )
            for url in dict.fromkeys(url.rstrip("/") for url in urls)
        ]
        try:
            wait_for_handshakes(peers, ready_timeout)
            check_agreement(peers, encoding)
        except BaseException:
            for peer in peers:
                peer.close()
            raise
        return cls(
            Dispatcher(peers, max_retries=max_retries, timeout=timeout),
            device=torch.device(device),
            encoding=encoding,
            rows=rows,
            probs_dtype=probs_dtype,
        )

    def generate_batch(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        seq_lens: SeqLens | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Eagle3TargetBatch:
        """See `Eagle3TargetBackend.generate_batch`."""
        rows, request = self._read(
            input_ids,
            attention_mask,
            loss_mask,
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )
        return self._run(rows, request, self._draft_head)

    def generate_batch_async(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        seq_lens: SeqLens | None = None,
        doc_remaining: torch.Tensor | None = None,
    ) -> Future[Eagle3TargetBatch]:
        """See `Eagle3TargetBackend.generate_batch_async`."""
        rows, request = self._read(
            input_ids,
            attention_mask,
            loss_mask,
            position_ids=position_ids,
            seq_lens=seq_lens,
            doc_remaining=doc_remaining,
        )
        with self._lock:
            if self._executor is None:
                workers = WORKERS_PER_SERVER * len(self._dispatcher.standings)
                self._executor = ThreadPoolExecutor(workers, thread_name_prefix="eagle-target-client")
            return self._executor.submit(self._run, rows, request, self._draft_head)

    def model_info(self) -> dict[str, Any]:
        """Facts about the target, each server's health and transport, and what has travelled."""
        return {
            **self._info.model_dump(mode="json"),
            "aux_layer_ids": list(self._aux_layer_ids),
            "fingerprint": self._fingerprint,
            "encoding": self._encoding,
            "servers": [
                {
                    "url": standing.peer.url,
                    "transport": standing.peer.transport,
                    "transports_refused": dict(standing.peer.refused),
                    "healthy": standing.failures == 0,
                    "outstanding": standing.outstanding,
                    "last_error": standing.last_error,
                }
                for standing in self._dispatcher.standings
            ],
            "traffic": {**self._traffic, "retries": self._dispatcher.retries},
        }

    def input_embedding_weight(self) -> torch.Tensor:
        """Fetched at each call; keep it."""
        return self._dispatcher.run(lambda peer: peer.fetch_input_embedding()).to(self._device)

    def close(self) -> None:
        """Cancel what is on its way and close every connection."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            executor, self._executor = self._executor, None
        self._dispatcher.stop()
        for standing in self._dispatcher.standings:
            standing.peer.close()
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)
        self._buffers.close()

    def _use_mapping(self, mapping: VocabMapping) -> None:
        mapping.check_target(self._info.vocab_size)
        if self._encoding == "hidden":
            self._draft_head = self._dispatcher.run(lambda peer: peer.fetch_draft_head(mapping)).to(self._device)
        for standing in self._dispatcher.standings:
            standing.peer.upload_mapping(mapping)
        self._mapping = mapping

    def _read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor, **packing: Any
    ) -> tuple[TrainerRows, SupervisionRequest]:
        if self._closed:
            raise ConnectError("this client is closed: build a new one")
        rows = read_trainer_rows(input_ids, attention_mask, loss_mask, vocab_size=self._info.vocab_size, **packing)
        request = rows.request(
            encoding=self._encoding, rows=self._rows, mapping=self._mapping, probs_dtype=self._probs_dtype
        )
        request.check(self._info)
        if self._encoding == "hidden" and self._draft_head is None:
            raise ContractError("encoding 'hidden' needs the draft's rows of the head: call set_vocab_mapping first")
        return rows, request

    def _run(self, rows: TrainerRows, request: SupervisionRequest, draft_head: DraftHead | None) -> Eagle3TargetBatch:
        def attempt(peer: Peer) -> Eagle3TargetBatch:
            assembler = BatchAssembler(
                rows, request, draft_head=draft_head, device=self._device, allocate=self._allocate
            )
            staged = None if self._device.type == "cpu" else StagedSink(assembler)
            sink: Sink = staged or assembler
            body_bytes = peer.supervise(request, sink)
            if staged is not None:
                staged.flush()
            with torch.no_grad():
                batch = assembler.finish()
            with self._lock:
                self._traffic["requests"] += 1
                self._traffic["tokens"] += request.tokens
                self._traffic["bytes_received"] += body_bytes
            return batch

        return self._dispatcher.run(attempt)

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self._device.type == "cpu":
            return self._buffers.allocate(shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)
