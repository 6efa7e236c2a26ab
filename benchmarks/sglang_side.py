"""Processes of `benchmarks.sglang_extend`: one with an SGLang engine in it, one with the HF adapter.

tokens = sum of the lengths of one batch; every contender starts from the same token ids.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import MB, answer_commands, memory
from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.contract.vocab_mapping import VocabMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.runner import TargetRunner

    Rows = list[list[int]]
    Work = Callable[[Rows], dict[str, torch.Tensor]]

# glibc's mallopt: allocations of this many bytes are mapped each on its own.
M_MMAP_THRESHOLD = -3
MAPPED_BYTES = 1 << 20


class Side:
    """A loaded target and what is timed on it."""

    def __init__(self, runner: TargetRunner, draft_vocab: int, aux_layer_ids: Sequence[int]) -> None:
        self.runner = runner
        self.aux_layer_ids = tuple(aux_layer_ids)
        runner.set_aux_layers(self.aux_layer_ids)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randperm(runner.info.vocab_size, generator=draw)[:draft_vocab].clone()
        self.mapping = VocabMapping.from_ids(ids, runner.info.vocab_size)
        self.works: dict[str, Work] = {
            "supervision": lambda rows: self.supervise(rows, every=2),
            "all_rows": lambda rows: self.supervise(rows, every=1),
        }

    def run(self, work: str, lengths: list[int]) -> dict[str, Any]:
        """Time one contender once, with the memory it took beside its outputs."""
        draw = torch.Generator().manual_seed(sum(lengths))
        rows = [torch.randint(0, self.runner.info.vocab_size, (length,), generator=draw).tolist() for length in lengths]
        trim_heap()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
        before = memory()["rss_mb"]
        started = time.perf_counter()
        with torch.no_grad():
            outputs = self.works[work](rows)
        seconds = time.perf_counter() - started
        extra = peak_mb() - before - sum(tensor.nbytes for tensor in outputs.values()) / MB
        probe = {}
        if "target_probs" in outputs:
            # Of the row that every contender has: the prediction at the second token of the first sequence.
            probe["probs"] = float(outputs["target_probs"].flatten()[: self.mapping.draft_vocab_size].square().sum())
            probe["aux"] = float(outputs["aux_hidden_states"].flatten()[-97:].sum())
        return {"seconds": seconds, "extra_mb": extra, "probe": probe}

    def supervise(self, rows: Rows, every: int) -> dict[str, torch.Tensor]:
        """Supervision as a client gets it, where every second row bears loss, or every one."""
        masks = [torch.zeros(len(row), dtype=torch.bool) for row in rows]
        for mask in masks:
            mask[1::every] = True
        request = SupervisionRequest(
            input_ids=flat(rows),
            seq_lens=tuple(len(row) for row in rows),
            row_mask=torch.cat(masks),
            mapping=self.mapping,
        )
        sink = PackedTensors()
        compute_supervision(self.runner, request, sink)
        return sink


class SGLangSide(Side):
    """Has the engine's own extend, the bare capture and the reference's way on the same engine, too."""

    def __init__(self, model: str, draft_vocab: int, aux_layer_ids: Sequence[int]) -> None:
        from eagle_target_sglang import SGLangAdapter, SGLangOptions

        runner: Any = SGLangAdapter.load(model, SGLangOptions(self_check=False, in_process=True))
        super().__init__(runner, draft_vocab, aux_layer_ids)
        self.works |= {"capture": self.capture, "extend": self.extend, "reference": self.reference}

    def capture(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The adapter's forward: hidden states of every row, no logits."""
        forward = self.runner.forward_eagle3(flat(rows), [len(row) for row in rows])
        return {"aux_hidden_states": forward.aux_hidden_states, "last_hidden_states": forward.last_hidden_states}

    def extend(self, rows: Rows) -> dict[str, torch.Tensor]:
        """SGLang's own prefill, by its own bench helpers: nothing captured, no hook, one token sampled a sequence."""
        from eagle_target_sglang import generations

        model_runner = self.runner._model_runner  # type: ignore[attr-defined]  # noqa: SLF001
        model = model_runner.model
        capture = self.runner._capture  # type: ignore[attr-defined]  # noqa: SLF001
        capture.close()
        layers = model.model.layers_to_capture
        model.model.layers_to_capture, model.capture_aux_hidden_states = [], False
        try:
            bench = generations._one_batch()  # noqa: SLF001
            requests = bench.prepare_synthetic_inputs_for_latency_test(len(rows), 0, custom_inputs=rows)
            _, logits, _ = bench.extend(requests, model_runner)
        finally:
            generations.free_pools(model_runner)
            model.model.layers_to_capture, model.capture_aux_hidden_states = layers, True
            self.runner._capture = type(capture)(model)  # type: ignore[attr-defined]  # noqa: SLF001
            self.runner.set_aux_layers(self.aux_layer_ids)
        return {"logits": logits}

    def reference(self, rows: Rows) -> dict[str, torch.Tensor]:
        """As NeMo AutoModel's backend does: logits of every row, shifted left, then the draft's softmax and a mask."""
        forward = self.runner.forward_eagle3(flat(rows), [len(row) for row in rows])
        shape = (len(rows), len(rows[0]), -1)
        logits = self.runner.compute_logits(forward.last_hidden_states).reshape(shape)
        shifted = torch.cat([logits[:, 1:], torch.zeros_like(logits[:, :1])], dim=1)
        in_draft = self.mapping.selected_token_mask[shifted.argmax(dim=-1)]
        probs = torch.softmax(shifted[..., self.mapping.selected_token_ids].float(), dim=-1)
        return {"aux_hidden_states": forward.aux_hidden_states, "target_probs": probs, "in_draft": in_draft}


class HFSide(Side):
    """The HF adapter on the same checkpoint."""

    def __init__(self, model: str, draft_vocab: int, aux_layer_ids: Sequence[int]) -> None:
        from eagle_target_hf import HFAdapter, HFOptions

        super().__init__(HFAdapter.load(model, HFOptions(device="cpu")), draft_vocab, aux_layer_ids)


def flat(rows: Rows) -> torch.Tensor:
    """`[tokens]` of rows."""
    return torch.tensor([token for row in rows for token in row])


def trim_heap() -> None:
    """Give memory that is free, but still the process's, back: what is resident is then in use."""
    ctypes.CDLL(None).malloc_trim(0)


def measure_memory_in_use() -> dict[str, Any]:
    """From now on tensors that are freed are resident no more; the C heap would keep some, to give them out again."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    return {}


def peak_mb() -> float:
    """The most resident memory since the peak was started again."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB


def main() -> None:
    kind, model, draft_vocab, threads, *aux_layer_ids = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = {"sglang": SGLangSide, "hf": HFSide}[kind](model, int(draft_vocab), [int(layer) for layer in aux_layer_ids])
    answer_commands({"run": side.run, "measure_memory_in_use": measure_memory_in_use})


if __name__ == "__main__":
    main()
