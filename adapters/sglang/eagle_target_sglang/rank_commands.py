"""What one rank does when told: every rank runs the same command, rank 0 answers with tensors.

Names of commands and fields are those that `isolated` sends.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.compute.supervise import check_forward, split_forward, store_supervision
from eagle_target.contract.sinks import RowStore
from eagle_target.errors import AdapterError
from eagle_target.protocol.messages import decode_mapping, decode_request
from eagle_target.protocol.tensors import tensor_bytes
from eagle_target_sglang.loading import load_in_process
from eagle_target_sglang.messages import SharedTensors, share
from eagle_target_sglang.options import SGLangOptions
from eagle_target_sglang.pinned import PinnedCopier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.sinks import Sink
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target_sglang.runner import SGLangTargetRunner

    Tensors = dict[str, torch.Tensor]
    Result = tuple[dict[str, Any], SharedTensors | None]

KEPT_MAPPINGS = 32


class RankCommands:
    """The commands of one rank, over the runner that `load` makes."""

    def __init__(self) -> None:
        self._runner: SGLangTargetRunner | None = None
        self._answers = True
        self._mappings: dict[str, VocabMapping] = {}
        self._copier: PinnedCopier | None = None

    def handle(self, header: dict[str, Any], tensors: Tensors) -> Result:
        """Run one command."""
        command = header["command"]
        if command == "load":
            return self._load(header)
        if self._runner is None or command not in _COMMANDS:
            raise AdapterError(f"a rank cannot do {command!r} now")
        return _COMMANDS[command](self, self._runner, header, tensors)

    def _load(self, header: dict[str, Any]) -> Result:
        options = SGLangOptions(**header["options"])
        # The other ranks take part in every forward and have nothing to say.
        self._answers = header["rank"] == 0
        self._runner = load_in_process(header["model"], options, rank=header["rank"], port=header["port"])
        device = torch.device(self._runner.info.device)
        self._copier = None if device.type == "cpu" else PinnedCopier(device)
        return {"info": self._runner.info.model_dump(mode="json"), "limits": _limits(self._runner)}, None

    def _set_aux_layers(self, runner: SGLangTargetRunner, header: dict[str, Any], tensors: Tensors) -> Result:
        del tensors
        runner.set_aux_layers(header["aux_layer_ids"])
        return {}, None

    def _forward(self, runner: SGLangTargetRunner, header: dict[str, Any], tensors: Tensors) -> Result:
        forward = runner.forward_eagle3(tensors["input_ids"], header["seq_lens"])
        return self._give({"aux": forward.aux_hidden_states, "last": forward.last_hidden_states})

    def _logits(self, runner: SGLangTargetRunner, header: dict[str, Any], tensors: Tensors) -> Result:
        del header
        return self._give({"logits": runner.compute_logits(tensors["hidden"])})

    def _embedding(self, runner: SGLangTargetRunner, header: dict[str, Any], tensors: Tensors) -> Result:
        del header, tensors
        return self._give({"weight": runner.input_embedding_weight()})

    def _draft_head(self, runner: SGLangTargetRunner, header: dict[str, Any], tensors: Tensors) -> Result:
        del header
        head = runner.draft_head(tensors["token_ids"])
        if head is None:
            return {"plain": False}, None
        _, shared = self._give({"weight": head.weight})
        return {"plain": True, "logit_scale": head.logit_scale, "soft_cap": head.soft_cap}, shared

    def _supervise(self, runner: SGLangTargetRunner, header: dict[str, Any], tensors: Tensors) -> Result:
        # Checked where they came from outside: this process belongs to the server that sends them.
        requests = [
            decode_request(tensor_bytes(tensors[str(index)]), lambda sha256: self._mapping(sha256, tensors))
            for index in range(header["requests"])
        ]
        started = time.perf_counter()
        with torch.no_grad():
            forward = runner.forward_eagle3(
                torch.cat([request.input_ids for request in requests]),
                [length for request in requests for length in request.seq_lens],
            )
            check_forward(forward, sum(request.tokens for request in requests), runner.info)
            forward_seconds = time.perf_counter() - started
            shared = SharedTensors(self._copier)
            for index, (request, part) in enumerate(
                zip(requests, split_forward(forward, [request.tokens for request in requests]), strict=True)
            ):
                sink: Sink = _Prefixed(shared, f"{index}.") if self._answers else _Nowhere()
                store_supervision(runner, request, part, sink)
        timings = {"forward": forward_seconds, "projection": time.perf_counter() - started - forward_seconds}
        return {"timings": timings}, shared

    def _mapping(self, sha256: str, tensors: Tensors) -> VocabMapping:
        if sha256 not in self._mappings:
            while len(self._mappings) >= KEPT_MAPPINGS:
                self._mappings.pop(next(iter(self._mappings)))
            self._mappings[sha256] = decode_mapping(tensor_bytes(tensors[sha256]))
        return self._mappings[sha256]

    def _give(self, tensors: Tensors) -> Result:
        return {}, share(tensors, self._copier) if self._answers else None


_COMMANDS: dict[str, Callable[[RankCommands, SGLangTargetRunner, dict[str, Any], Tensors], Result]] = {
    "set_aux_layers": RankCommands._set_aux_layers,  # noqa: SLF001
    "forward": RankCommands._forward,  # noqa: SLF001
    "logits": RankCommands._logits,  # noqa: SLF001
    "embedding": RankCommands._embedding,  # noqa: SLF001
    "draft_head": RankCommands._draft_head,  # noqa: SLF001
    "supervise": RankCommands._supervise,  # noqa: SLF001
}


class _Prefixed:
    """Names of one request's tensors among those of all."""

    def __init__(self, shared: SharedTensors, prefix: str) -> None:
        self._shared = shared
        self._prefix = prefix

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        return self._shared.allocate(self._prefix + name, shape, dtype)

    def put(self, name: str, rows: torch.Tensor) -> None:
        self._shared.put(self._prefix + name, rows)


class _Nowhere:
    """Keeps nothing."""

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        del name
        return _NoRows(torch.empty((0, *shape[1:]), dtype=dtype))

    def put(self, name: str, rows: torch.Tensor) -> None:
        del name, rows


class _NoRows(RowStore):
    def write(self, start: int, rows: torch.Tensor) -> None:
        del start, rows


def _limits(runner: SGLangTargetRunner) -> dict[str, int]:
    limits = runner.limits
    return {
        "sequences": limits.sequences,
        "tokens": limits.tokens,
        "page_size": limits.page_size,
        "context_length": limits.context_length,
    }
