"""A running vLLM engine as a target runner that projects in its workers."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import vllm
from typing_extensions import override

from eagle_target.checkpoints.digest import hub_commit
from eagle_target.contract.request import answer_spec, forward_spec
from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
from eagle_target.contract.target import TargetInfo, validate_aux_layer_ids
from eagle_target.errors import AdapterError, EngineDead
from eagle_target.protocol.messages import encode_mapping, encode_request
from eagle_target_vllm.blocks import BlockPool
from eagle_target_vllm.connector import state_ids
from eagle_target_vllm.failures import engine_call
from eagle_target_vllm.feeding import check_outcome, has_lost_process, run_sequences, step_until
from eagle_target_vllm.inline import INLINE_LOCK
from eagle_target_vllm.loading import end_engine
from eagle_target_vllm.memory import EngineBlock, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.v1.engine.llm_engine import LLMEngine

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target_vllm.blocks import Lease
    from eagle_target_vllm.loading import LoadedEngine
    from eagle_target_vllm.memory import Address, Slot

# More than a server lets wait at a time, each with its own.
MAX_MAPPINGS = 128
MEMORY = "taking memory for an answer"
# How long a connector may take to hand over what a forward computed.
SAVE_SECONDS = 30.0


class VLLMTargetRunner(TargetRunner):
    """Runs a loaded engine; see `TargetRunner.supervise`. One thread at a time.

    Args:
        loaded: a running engine, which `close` ends.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self._engine: LLMEngine | None = loaded.engine
        self._is_inline = loaded.is_inline
        self._has_inline_worker = loaded.has_inline_worker
        self._lock = INLINE_LOCK if loaded.is_inline else nullcontext()
        self._facts = loaded.facts
        self._uses_connector = loaded.options.capture == "connector"
        self._logits_dtype: torch.dtype = getattr(torch, loaded.facts["logits_dtype"])
        self._aux_layer_ids: tuple[int, ...] = ()
        self._mappings: OrderedDict[str, None] = OrderedDict()
        self._serials = count()
        self._blocks = BlockPool()
        self._failure: str | None = None
        self._info = _describe(loaded)
        self._compiled_layers = loaded.aux_layer_ids if loaded.is_compiled else None

    @property
    def info(self) -> TargetInfo:
        """See `TargetRunner.info`; the device is the CPU where the workers are other processes."""
        return self._info

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """See `TargetRunner.set_aux_layers`."""
        layers = validate_aux_layer_ids(aux_layer_ids, self._info.num_layers)
        if layers == self._aux_layer_ids:
            return
        if self._compiled_layers not in (None, layers):
            raise AdapterError(
                f"the target has layers {self._compiled_layers} compiled in, {layers} are asked for: name them when "
                "it is loaded (--aux-layer-ids), or use -o enforce_eager=true"
            )
        states: tuple[int, ...] = ()
        if self._uses_connector:
            states = state_ids(layers, self._info.num_layers)
            # States of other layers are cached beside the keys and values.
            self._open().reset_prefix_cache()
        self._call("set_layers", list(layers), list(states), what="choosing the layers")
        self._aux_layer_ids = layers

    @override
    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        """See `TargetRunner.supervise`.

        Raises:
            AdapterError: no layers were set, the runner is closed, or the engine failed.
        """
        for request in requests:
            if request.mapping is not None:
                self._send_mapping(request.mapping)
        ids = [ids for request in requests for ids in torch.split(request.input_ids, list(request.seq_lens))]
        if self._has_inline_worker:
            jobs = [_job(request, None) for request in requests]
            return self._run(jobs, ids, None, list(sinks))
        layout = Layout()
        placed = [
            layout.place(answer_spec(request, self._info, logits_dtype=self._logits_dtype)) for request in requests
        ]
        jobs = [_job(request, slots) for request, slots in zip(requests, placed, strict=True)]
        lease = self._lease(layout.size)
        timings = self._run(jobs, ids, lease.address, None)
        for slots, sink in zip(placed, sinks, strict=True):
            for slot in slots:
                sink.put(slot.name, lease.tensor(slot))
        return timings

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """See `TargetRunner.forward_eagle3`; `[tokens, ...]` on `info.device`.

        Raises:
            AdapterError: no layers were set, the runner is closed, or the engine failed.
        """
        layout = Layout()
        slots = layout.place(forward_spec(len(input_ids), self._info))
        lease = self._lease(layout.size)
        ids = list(torch.split(input_ids, list(seq_lens)))
        job = {"request": None, "seq_lens": list(seq_lens), "slots": [slot.plain() for slot in slots]}
        self._run([job], ids, lease.address, None)
        aux, last = (lease.tensor(slot).to(self._info.device) for slot in slots)
        return TargetForward(aux_hidden_states=aux, last_hidden_states=last)

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """See `TargetRunner.compute_logits`.

        Raises:
            AdapterError: the runner is closed, or the engine failed.
        """
        layout = Layout()
        rows = len(last_hidden_states)
        hidden = layout.add("hidden", (rows, self._info.hidden_size), last_hidden_states.dtype)
        logits = layout.add("logits", (rows, self._info.vocab_size), self._logits_dtype)
        block = self._new_block(layout.size)
        if rows:
            block.tensor(hidden).copy_(last_hidden_states)
        self._call("compute_logits", block.address, hidden.plain(), logits.plain(), what="the target's head")
        block.release()
        return block.tensor(logits).to(self._info.device)

    @override
    def token_capacity(self) -> int | None:
        """See `TargetRunner.token_capacity`: tokens of the KV cache; more would wait inside the engine."""
        cache = self._open().vllm_config.cache_config
        return int(cache.num_gpu_blocks) * int(cache.block_size) if cache.num_gpu_blocks else None

    @override
    def check_alive(self) -> None:
        """See `TargetRunner.check_alive`."""
        if has_lost_process(self._open(), patience=0.0):
            self._failure = f"a process of vLLM {vllm.__version__} died, its log says why: restart the server"
            raise EngineDead(self._failure)

    def input_embedding_weight(self) -> torch.Tensor:
        """See `TargetRunner.input_embedding_weight`; a copy, on the CPU.

        Raises:
            AdapterError: the runner is closed, or the engine failed.
        """
        ids = torch.arange(self._info.vocab_size)
        return self._rows("embedding_rows", ids, has_bias=False)[0]

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """See `TargetRunner.draft_head`; a copy of the rows, on the CPU.

        Raises:
            AdapterError: the runner is closed, or the engine failed.
        """
        self._open()
        if self._facts["head"] is None:
            return None
        scale, soft_cap, has_bias = self._facts["head"]
        weight, bias = self._rows("head_rows", token_ids, has_bias=has_bias)
        return DraftHead(weight=weight, bias=bias, logit_scale=scale, soft_cap=soft_cap)

    def close(self) -> None:
        """Stop the engine and its processes. Safe to call twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            end_engine(engine, inline=self._is_inline)

    def _run(
        self,
        jobs: list[dict[str, Any]],
        sequences: Sequence[torch.Tensor],
        address: Address | None,
        sinks: list[Sink] | None,
    ) -> dict[str, float]:
        """Run sequences; results go to a block of memory or to the sinks. Returns seconds by stage."""
        engine = self._open()
        if not self._aux_layer_ids:
            raise AdapterError("no layers to capture: call set_aux_layers first")
        started = time.perf_counter()
        serial = next(self._serials)
        what = "the target's forward"
        try:
            self._call("begin", serial, jobs, address, sinks, self._blocks.take_dropped(), what=what)
            with self._watched(what):
                ids = [sequence.tolist() for sequence in sequences]
                run_sequences(engine, serial, ids, may_reuse_prefixes=self._uses_connector)
                if self._uses_connector:
                    step_until(engine, lambda: self._call("is_complete", what=what), timeout=SAVE_SECONDS)
            forwarded = time.perf_counter()
            outcome = self._call("finish", what="the projection")
        except BaseException:
            self._give_up()
            raise
        check_outcome(outcome)
        return {"forward": forwarded - started, "projection": time.perf_counter() - forwarded}

    def _give_up(self) -> None:
        try:
            self._call("give_up", what="giving up a forward")
        # The error that led here is raised; a dead engine cannot be told.
        except AdapterError:
            return

    def _send_mapping(self, mapping: VocabMapping) -> None:
        if mapping.sha256 in self._mappings:
            return
        body = b"".join(encode_mapping(mapping))
        self._call("add_mapping", body, MAX_MAPPINGS, what="taking a vocabulary mapping")
        self._mappings[mapping.sha256] = None
        while len(self._mappings) > MAX_MAPPINGS:
            self._mappings.popitem(last=False)

    def _rows(self, method: str, ids: torch.Tensor, *, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        layout = Layout()
        dtype = getattr(torch, self._info.dtype)
        ids_slot = layout.add("ids", (len(ids),), torch.int64)
        slots = [layout.add("weight", (len(ids), self._info.hidden_size), dtype)]
        if has_bias:
            slots.append(layout.add("bias", (len(ids),), dtype))
        block = self._new_block(layout.size)
        block.tensor(ids_slot).copy_(ids)
        self._call(method, block.address, ids_slot.plain(), [slot.plain() for slot in slots], what="reading weights")
        block.release()
        weight, *bias = [block.tensor(slot) for slot in slots]
        return weight, bias[0] if bias else None

    def _lease(self, size: int) -> Lease:
        with engine_call(MEMORY):
            return self._blocks.lease(size)

    def _new_block(self, size: int) -> EngineBlock:
        with engine_call(MEMORY):
            return EngineBlock.create(size)

    def _call(self, method: str, *arguments: Any, what: str) -> Any:
        """Call a method of all workers and return what the first one gives."""
        engine = self._open()
        with self._watched(what):
            return engine.collective_rpc("eagle_target", args=(method, *arguments))[0]

    def _open(self) -> LLMEngine:
        if self._engine is None:
            raise AdapterError(f"the target {self._info.model} is closed: load it again")
        if self._failure is not None:
            raise EngineDead(self._failure)
        return self._engine

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        """Run the engine; once it is dead, say so at every later call without asking it."""
        try:
            with engine_call(what), self._lock:
                yield
        except EngineDead as error:
            self._failure = str(error)
            raise
        except AdapterError as error:
            if self._engine is not None and has_lost_process(self._engine):
                self._failure = (
                    f"a worker of vLLM {vllm.__version__} died in {what}, its log says why: restart the server"
                )
                raise EngineDead(self._failure) from error
            raise


def _job(request: SupervisionRequest, slots: list[Slot] | None) -> dict[str, Any]:
    """A request and where its answer goes, as plain values for `TargetWorker.begin`."""
    return {
        "request": b"".join(encode_request(request)),
        "slots": None if slots is None else [slot.plain() for slot in slots],
    }


def _describe(loaded: LoadedEngine) -> TargetInfo:
    """What a worker says of the target, and what it was loaded from."""
    info = TargetInfo(**loaded.facts["info"])
    return info.model_copy(
        update={
            "model": loaded.name,
            "revision": hub_commit(loaded.name, loaded.options.revision),
            "weights": loaded.weights,
            "device": info.device if loaded.has_inline_worker else "cpu",
            # The engine wants room for one generated token.
            "max_seq_len": loaded.engine.model_config.max_model_len - 1,
        }
    )
