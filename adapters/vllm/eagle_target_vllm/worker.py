"""What runs inside vLLM's workers: capture, projection and rows of the weights.

All ranks call everything in the same order, for the head is a collective; only the first rank gives results away.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm import __version__ as vllm_version
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer import get_kv_transfer_group

from eagle_target.compute.projection import project_full, tile_rows
from eagle_target.contract.request import answer_spec, forward_spec
from eagle_target.contract.target import TargetInfo
from eagle_target.protocol.messages import decode_mapping, decode_request
from eagle_target_vllm.blocks import OpenBlocks
from eagle_target_vllm.capture import CapturedSequence, ForwardCapture, StepObserver
from eagle_target_vllm.compatibility import find_obstacle
from eagle_target_vllm.memory import BlockSink, EngineBlock, Slot
from eagle_target_vllm.weights import find_embedding, find_final_norm, find_head_form

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target.contract.request import SupervisionRequest, TensorSpec
    from eagle_target.contract.sinks import Sink
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target_vllm.memory import Address, PlainSlot


class TargetWorkerExtension:
    """What vLLM mixes into its worker class: one method, so that no name of the worker's is taken."""

    def eagle_target(self, method: str, *arguments: Any) -> Any:
        """Call a method of this worker's `TargetWorker`."""
        target = self.__dict__.get("eagle_target_worker")
        if target is None:
            target = self.__dict__["eagle_target_worker"] = TargetWorker(self)
        with torch.no_grad():
            return getattr(target, method)(*arguments)


@dataclass(slots=True, eq=False)
class Job:
    """One request of a forward, in a worker.

    aux: `[tokens, 3*hidden]`, on the first rank. last: `[tokens, hidden]`. seq_lens: tokens of each sequence.
    request: what is asked, and rows: int64, which of `last` are projected; None where the hidden states are asked for.
    """

    aux: torch.Tensor | None
    last: torch.Tensor
    seq_lens: Sequence[int]
    request: SupervisionRequest | None
    rows: torch.Tensor | None
    sink: Sink | None


class TargetWorker:
    """Capture and projection in one worker of vLLM."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._runner = worker.model_runner
        self._mappings: OrderedDict[str, VocabMapping] = OrderedDict()
        self._jobs: list[Job] = []
        self._aux_ids: tuple[int, ...] = ()
        self._state_ids: tuple[int, ...] = ()

    def prepare(self, layer_ids: Sequence[int]) -> None:
        """Have the model give the outputs of these layers from its first forward on, which compiles it."""
        # What stands in the way is for `start` to say.
        if find_obstacle(self._worker, vllm_version) is None:
            self.set_layers(layer_ids, ())
            self._runner.use_aux_hidden_state_outputs = True

    def start(self, capture: str) -> dict[str, Any]:
        """Check what this vLLM and this model offer, begin to observe, and say what the target is."""
        obstacle = find_obstacle(self._worker, vllm_version)
        if obstacle:
            return {"obstacle": obstacle}
        self._model = self._runner.get_model()
        self._device = next(self._model.parameters()).device
        self._info = _describe(self._worker.vllm_config.model_config, self._device)
        self._blocks = OpenBlocks(self._device)
        self._is_first = get_tensor_model_parallel_rank() == 0
        self._observer = StepObserver(self._runner, stores=capture == "worker")
        if capture == "connector":
            connector: Any = get_kv_transfer_group()
            connector.receiver = self._receive
        else:
            self._runner.use_aux_hidden_state_outputs = True
        self._norm: Any = find_final_norm(self._model)
        if capture == "connector" and self._norm is None:
            return {"obstacle": f"a {type(self._model).__name__} has no model.norm: use -o capture=worker"}
        hidden_size, dtype = self._info.hidden_size, getattr(torch, self._info.dtype)
        self._head = find_head_form(self._model, hidden_size, dtype, self._model.compute_logits)
        self._embedding = find_embedding(self._model, hidden_size)
        logits = self._model.compute_logits(torch.zeros(1, hidden_size, dtype=dtype, device=self._device))
        head = self._head
        return {
            "obstacle": None,
            "info": self._info.model_dump(mode="json"),
            "logits_shape": None if logits is None else list(logits.shape),
            "logits_dtype": None if logits is None else str(logits.dtype).removeprefix("torch."),
            "has_embedding": self._embedding is not None,
            "head": None if head is None else [head.logit_scale, head.soft_cap, head.shard.bias is not None],
        }

    def set_layers(self, layer_ids: Sequence[int], all_state_ids: Sequence[int]) -> None:
        """Capture the output of these decoder layers; `all_state_ids` of vLLM's are what a connector is given."""
        # vLLM counts what enters a layer: the output of layer i enters layer i + 1.
        self._aux_ids = tuple(layer + 1 for layer in sorted(layer_ids))
        self._state_ids = tuple(all_state_ids)
        self._runner.get_model().set_aux_hidden_state_layers(self._state_ids or self._aux_ids)

    def is_complete(self) -> bool:
        """Whether all that a forward asks for has been captured."""
        capture = self._observer.capture
        return capture is None or not capture.shortfall()

    @torch.no_grad()
    def _receive(self, request_id: str, states: torch.Tensor) -> None:
        """Take `[n, states, hidden]` from the connector; the last of them is before the final norm."""
        aux = [states[:, self._state_ids.index(state)] for state in self._aux_ids]
        last = self._norm(states[:, -1].contiguous())
        self._observer.receive(request_id, aux, last)

    def add_mapping(self, body: bytes, limit: int) -> None:
        """Keep a vocabulary mapping, as `encode_mapping` gives it; the oldest goes when there are more than `limit`."""
        mapping = decode_mapping(memoryview(bytearray(body)))
        self._mappings[mapping.sha256] = mapping
        while len(self._mappings) > limit:
            self._mappings.popitem(last=False)

    def begin(
        self,
        serial: int,
        jobs: Sequence[dict[str, Any]],
        address: Address | None,
        sinks: Sequence[Sink] | None,
        dropped: list[int],
    ) -> None:
        """Get ready for a forward; results go to sinks of this process, or to a block of memory.

        jobs: `request`, as `encode_request` gives it, or `seq_lens` of a plain forward; `slots`, places in the block.
        dropped: numbers of blocks that are no longer used.
        """
        self._blocks.forget(dropped)
        # Only the first rank gives results away, so the others open nothing.
        block, is_pinned = self._blocks.open(address) if address is not None and self._is_first else (None, False)
        self._jobs = []
        for index, plain in enumerate(jobs):
            sink = None if sinks is None else sinks[index]
            if block is not None:
                sink = BlockSink(block, [Slot.read(slot) for slot in plain["slots"]], is_pinned=is_pinned)
            self._jobs.append(self._make_job(plain, sink))
        sequences = []
        for job in self._jobs:
            lengths = list(job.seq_lens)
            lasts = torch.split(job.last, lengths)
            auxes: Sequence[torch.Tensor | None] = (
                [None] * len(lengths) if job.aux is None else torch.split(job.aux, lengths)
            )
            sequences += [CapturedSequence(aux, last) for aux, last in zip(auxes, lasts, strict=True)]
        self._observer.begin(ForwardCapture(serial, sequences))

    def finish(self) -> dict[str, Any]:
        """Project what was captured and give it away; or say why not."""
        capture, jobs = self._observer.capture, self._jobs
        self.give_up()
        if capture is None:
            return {"problem": "no forward was begun", "shortfall": []}
        shortfall = capture.shortfall()
        if capture.problem or shortfall:
            return {"problem": capture.problem, "shortfall": shortfall}
        for job in jobs:
            self._project(job)
        if self._device.type == "cuda":
            # No wait for the whole device: it would be one for whatever other threads have there, sends included that
            # spin until a client takes them.
            torch.cuda.current_stream(self._device).record_event().synchronize()
        return {"problem": None, "shortfall": []}

    def give_up(self) -> None:
        """Let go of a forward."""
        self._observer.end()
        self._jobs = []

    def compute_logits(self, address: Address, hidden_slot: PlainSlot, logits_slot: PlainSlot) -> None:
        """`[n, hidden]` of a block through the head, to `[n, vocab]` of the block."""
        block = EngineBlock.open_address(address)
        hidden = block.tensor(Slot.read(hidden_slot)).to(self._device)
        store = BlockSink(block, [Slot.read(logits_slot)]) if self._is_first else None
        for start, logits in self._tiles(hidden):
            if store is not None and logits is not None:
                store.rows("logits")[start : start + len(logits)].copy_(logits)

    def head_rows(self, address: Address, ids_slot: PlainSlot, slots: Sequence[PlainSlot]) -> None:
        """This rank's rows of the LM head for `[n]` ids of a block, to its weight `[n, hidden]` and bias `[n]`."""
        if self._head is not None:
            self._fill(self._head.shard, address, ids_slot, slots)

    def embedding_rows(self, address: Address, ids_slot: PlainSlot, slots: Sequence[PlainSlot]) -> None:
        """This rank's rows of the input embedding for `[n]` ids of a block, to its weight `[n, hidden]`."""
        if self._embedding is not None:
            self._fill(self._embedding, address, ids_slot, slots)

    def _fill(self, shard: Any, address: Address, ids_slot: PlainSlot, slots: Sequence[PlainSlot]) -> None:
        block = EngineBlock.open_address(address)
        weight, *bias = [block.tensor(Slot.read(slot)) for slot in slots]
        shard.fill(block.tensor(Slot.read(ids_slot)), weight, bias[0] if bias else None)

    def _make_job(self, plain: dict[str, Any], sink: Sink | None) -> Job:
        request: SupervisionRequest | None = None
        if plain["request"] is not None:
            # Checked where it came from outside: this process belongs to the server that sends it.
            request = decode_request(memoryview(bytearray(plain["request"])), self._mappings.__getitem__)
        seq_lens: Sequence[int] = plain["seq_lens"] if request is None else request.seq_lens
        states = forward_spec(sum(seq_lens), self._info)
        aux: torch.Tensor | None = None
        if isinstance(sink, BlockSink) and self._device.type == "cpu":
            aux = sink.rows("aux_hidden_states")
        elif self._is_first:
            aux = self._empty(states["aux_hidden_states"])
        return Job(
            aux=aux,
            last=self._empty(states["last_hidden_states"]),
            seq_lens=seq_lens,
            request=request,
            rows=None if request is None else request.row_mask.nonzero()[:, 0].to(self._device),
            sink=sink if self._is_first else None,
        )

    def _empty(self, spec: TensorSpec) -> torch.Tensor:
        return torch.empty(spec.shape, dtype=spec.dtype, device=self._device)

    def _project(self, job: Job) -> None:
        request, sink = job.request, job.sink
        if sink is not None and job.aux is not None:
            sink.put("aux_hidden_states", job.aux)
        if request is None or job.rows is None:
            if sink is not None:
                sink.put("last_hidden_states", job.last)
            return
        hidden = job.last.index_select(0, job.rows)
        if sink is not None and request.encoding == "hidden":
            sink.put("last_hidden_states", hidden)
        if not request.has_row_facts:
            return
        if sink is None:
            # Without rows `project_full` still asks for the dtype of logits.
            for _ in self._tiles(hidden, at_least_once=request.encoding == "logits"):
                pass
            return
        project_full(
            hidden,
            self._model.compute_logits,
            vocab_size=self._info.vocab_size,
            spec=answer_spec(request, self._info),
            mapping=None if request.mapping is None else request.mapping.to(self._device),
            sink=sink,
        )

    def _tiles(self, hidden: torch.Tensor, *, at_least_once: bool = False) -> Iterator[tuple[int, torch.Tensor | None]]:
        """The tiles that `project_full` asks the head for; logits are None on all ranks but the first."""
        tile = tile_rows(self._info.vocab_size, hidden.device)
        for start in range(0, max(len(hidden), int(at_least_once)), tile):
            yield start, self._model.compute_logits(hidden[start : start + tile])


def _describe(config: Any, device: torch.device) -> TargetInfo:
    """What a worker knows of the target by itself."""
    return TargetInfo(
        model=config.model,
        num_layers=config.get_total_num_hidden_layers(),
        hidden_size=config.get_hidden_size(),
        vocab_size=config.get_vocab_size(),
        dtype=str(config.dtype).removeprefix("torch."),
        device=str(device),
        engine="vllm",
        engine_version=vllm_version,
    )
