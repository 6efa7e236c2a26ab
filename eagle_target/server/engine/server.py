"""The server without HTTP: what its clients may ask, and what it keeps for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from eagle_target.contract.request import answer_bytes
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ContractError, VocabMappingError
from eagle_target.server.clients import Presences
from eagle_target.server.engine.engine import Engine
from eagle_target.server.engine.job import Call, Job
from eagle_target.server.engine.lifecycle import Lifecycle, Restarts
from eagle_target.server.engine.outbox import Outbox
from eagle_target.server.engine.scheduler import Scheduler
from eagle_target.server.engine.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    import torch

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import DraftHead, TargetRunner
    from eagle_target.contract.target import ServedTarget
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.errors import AdapterError
    from eagle_target.server.clients import ConnectedClient
    from eagle_target.server.engine.answer import Answer
    from eagle_target.server.engine.lifecycle import State


class TargetModelServer:
    """Answers supervision requests of any number of clients from one target.

    Args:
        load: loads the target; runs on the engine's thread.
        aux_layer_ids: the layers to capture; None for the default.
        max_batch_tokens: requests are joined into one forward up to this many tokens.
        max_queue: requests that may wait.
        max_mappings: vocabulary mappings kept, least recently used out first.
        max_outbox_bytes, max_client_outbox_bytes: answers that are not sent yet, of all clients and of one.
        max_restarts: how often within an hour an engine that died is loaded again.
        forward_timeout: seconds a call of the engine may take; 0 for any number.
        client_lease: seconds a client may be silent and still count as connected.

    Attributes:
        clients: which are connected. outbox: the answers that are not sent yet.
    """

    def __init__(
        self,
        load: Callable[[], TargetRunner],
        *,
        aux_layer_ids: Sequence[int] | None = None,
        max_batch_tokens: int = 8192,
        max_queue: int = 64,
        max_mappings: int = 32,
        max_outbox_bytes: int = 8 << 30,
        max_client_outbox_bytes: int = 2 << 30,
        max_restarts: int = 0,
        forward_timeout: float = 0.0,
        client_lease: float = 30.0,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self.outbox = Outbox(max_outbox_bytes, max_client_outbox_bytes)
        self.clients = Presences(client_lease)
        self._mappings = MappingStore(max_mappings)
        self._scheduler = Scheduler(max_waiting=max_queue, outbox=self.outbox)
        self._restarts = Restarts(max_restarts)
        self._lifecycle = Lifecycle(self._scheduler, self._restarts)
        self._watchdog = Watchdog(forward_timeout, self._lifecycle)
        self._engine = Engine(
            load,
            aux_layer_ids=aux_layer_ids,
            max_batch_tokens=max_batch_tokens,
            scheduler=self._scheduler,
            lifecycle=self._lifecycle,
            watchdog=self._watchdog,
        )

    def start(self) -> None:
        """Load the target and begin to answer, on a thread of its own."""
        self._watchdog.start()
        self._engine.start()

    @property
    def state(self) -> State:
        """What the server is doing."""
        return self._lifecycle.name

    @property
    def failure(self) -> str | None:
        """The last failure, until a forward goes well again."""
        return self._lifecycle.failure

    @property
    def ended_by(self) -> type[AdapterError] | None:
        """The kind of failure that the server does not go on after; None as long as it goes on."""
        return self._lifecycle.ended_by

    @property
    def served(self) -> ServedTarget:
        """What is served.

        Raises:
            Unavailable: the target is not loaded.
        """
        if self._lifecycle.served is None:
            raise self._lifecycle.unavailable()
        return self._lifecycle.served

    @property
    def encodings(self) -> tuple[str, ...]:
        """Encodings this target can answer in."""
        return ("probs", "hidden", "logits") if self._engine.has_draft_head else ("probs", "logits")

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler)

    @property
    def running(self) -> int:
        """Requests in the forward that runs."""
        return self._engine.running

    @property
    def padded_tokens(self) -> int:
        """Tokens the engine computed beside those that were asked for, where it tells."""
        return self._engine.padded_tokens

    @property
    def loads(self) -> int:
        """How often the target was loaded."""
        return self._lifecycle.loads

    @property
    def restarts(self) -> int:
        """How often the engine was loaded again, or was about to be."""
        return self._restarts.total

    @property
    def stuck_forwards(self) -> int:
        """Calls of the engine that did not return in time."""
        return self._watchdog.stuck

    def submit(
        self,
        request: SupervisionRequest,
        make_tensors: Callable[[], PackedTensors] = PackedTensors,
        *,
        client: str = "",
    ) -> Future[Answer]:
        """Queue a client's request; cancel the future to give it up, and release the answer when it was used.

        `make_tensors` gives the mapping its supervision goes to. Whoever holds the mapping holds room in the outbox.

        Raises:
            ContractError: the target cannot do what is asked.
            RequestTooLarge: there will never be room for the answer.
            Overloaded: the queue is full. Unavailable: loading, draining, failed or closed.
        """
        info = self.served.info
        request.check(info)
        if request.encoding not in self.encodings:
            raise ContractError(
                f"encoding {request.encoding!r} needs a plain LM head, which this target has not: "
                f"use one of {list(self.encodings)}"
            )
        size = answer_bytes(request, info)
        self.outbox.check(size)
        job = Job(
            request,
            client=client,
            make_tensors=make_tensors,
            answer_bytes=size,
            max_part_tokens=self._max_batch_tokens,
        )
        self._put(job)
        return job.future

    def connected_clients(self) -> list[ConnectedClient]:
        """The clients that are connected, in the order they came."""
        return self.clients.connected()

    def add_mapping(self, mapping: VocabMapping) -> None:
        """Keep a mapping under its hash.

        Raises:
            VocabMappingError: it is for another vocabulary.
        """
        mapping.check_target(self.served.info.vocab_size)
        self._mappings.add(mapping)

    def find_mapping(self, sha256: str) -> VocabMapping:
        """Return the mapping of a hash.

        Raises:
            VocabMappingError: it is not here; upload it.
        """
        return self._mappings.find(sha256)

    def input_embedding_weight(self) -> Future[torch.Tensor]:
        """The input embedding `[vocab, hidden]`."""
        return self._call(lambda runner: runner.input_embedding_weight())

    def draft_head(self, token_ids: torch.Tensor) -> Future[DraftHead | None]:
        """Rows of the LM head for int64 `[n]` ids, or None."""
        return self._call(lambda runner: runner.draft_head(token_ids))

    def drain(self) -> None:
        """Take no more requests; what is queued is still answered."""
        self._lifecycle.drain()

    def close(self, timeout: float = 30.0) -> None:
        """Give up what is queued, stop the thread and release the engine. Safe to call twice."""
        self._watchdog.stop()
        self._lifecycle.close()
        self._engine.close(timeout)

    def _call(self, function: Callable[[TargetRunner], Any]) -> Future[Any]:
        call = Call(function)
        self._put(call)
        return call.future

    def _put(self, work: Job | Call) -> None:
        if not self._lifecycle.is_serving:
            raise self._lifecycle.unavailable()
        self._scheduler.put(work)


class MappingStore:
    """The vocabulary mappings a server was given, by content: the `max_mappings` used last."""

    def __init__(self, max_mappings: int) -> None:
        self._max_mappings = max_mappings
        self._mappings: OrderedDict[str, VocabMapping] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, mapping: VocabMapping) -> None:
        """Keep a mapping under its hash."""
        with self._lock:
            self._mappings[mapping.sha256] = mapping
            self._mappings.move_to_end(mapping.sha256)
            while len(self._mappings) > self._max_mappings:
                self._mappings.popitem(last=False)

    def find(self, sha256: str) -> VocabMapping:
        """Return the mapping of a hash.

        Raises:
            VocabMappingError: it is not here; upload it.
        """
        with self._lock:
            if sha256 not in self._mappings:
                raise VocabMappingError(
                    f"this server has no vocabulary mapping {sha256[:64]!r}: PUT it to /v1/vocab-mappings/{{sha256}}"
                )
            self._mappings.move_to_end(sha256)
            return self._mappings[sha256]
