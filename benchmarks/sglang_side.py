"""Processes of `benchmarks.sglang_extend`: one with the SGLang engine in it, one with the HF adapter.

tokens = rows*width of one batch; every contender starts from the same token ids.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import MB, answer_commands, memory
from eagle_target.rows import PackedTensors
from eagle_target.supervision import SupervisionRequest, compute_supervision
from eagle_target.vocabulary import VocabMapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.runner import TargetRunner

AUX = (1, 3, 4)


class Side:
    """A loaded target and what is timed on it."""

    def __init__(self, runner: TargetRunner, draft_vocab: int) -> None:
        self.runner = runner
        runner.set_aux_layers(AUX)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randperm(runner.info.vocab_size, generator=draw)[:draft_vocab].clone()
        self.mapping = VocabMapping.from_ids(ids, runner.info.vocab_size)
        self.works: dict[str, Callable[[list[list[int]]], list[torch.Tensor]]] = {
            "capture": self.capture,
            "supervision": self.supervise,
        }

    def run(self, work: str, rows: int, width: int) -> dict[str, Any]:
        """Time one contender once, with the memory it took beside its outputs."""
        draw = torch.Generator().manual_seed(rows * width)
        ids = torch.randint(0, self.runner.info.vocab_size, (rows, width), generator=draw).tolist()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
        before = memory()["rss_mb"]
        started = time.perf_counter()
        with torch.no_grad():
            outputs = self.works[work](ids)
        seconds = time.perf_counter() - started
        output_mb = sum(tensor.nbytes for tensor in outputs) / MB
        probe = [float(tensor.flatten()[-97:].float().sum()) for tensor in outputs]
        return {"seconds": seconds, "extra_mb": peak_mb() - before - output_mb, "probe": probe}

    def capture(self, ids: list[list[int]]) -> list[torch.Tensor]:
        """The adapter's forward: hidden states of every row, no logits."""
        forward = self.runner.forward_eagle3(flat(ids), [len(row) for row in ids])
        return [forward.aux_hidden_states, forward.last_hidden_states]

    def supervise(self, ids: list[list[int]]) -> list[torch.Tensor]:
        """The same, and every row projected tile by tile."""
        tokens = flat(ids)
        request = SupervisionRequest(
            input_ids=tokens,
            seq_lens=tuple(len(row) for row in ids),
            row_mask=torch.ones(len(tokens), dtype=torch.bool),
            mapping=self.mapping,
        )
        sink = PackedTensors()
        compute_supervision(self.runner, request, sink)
        return [sink["aux_hidden_states"], sink["target_probs"]]


class SGLangSide(Side):
    """Has the engine's own extend, and the reference's way on the same engine, too."""

    def __init__(self, model: str, draft_vocab: int) -> None:
        from eagle_target_sglang import SGLangAdapter, SGLangOptions

        runner: Any = SGLangAdapter.load(model, SGLangOptions(self_check=False, in_process=True))
        super().__init__(runner, draft_vocab)
        self.works |= {"extend": self.extend, "reference": self.reference}

    def extend(self, ids: list[list[int]]) -> list[torch.Tensor]:
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
            requests = bench.prepare_synthetic_inputs_for_latency_test(len(ids), 0, custom_inputs=ids)
            _, logits, _ = bench.extend(requests, model_runner)
        finally:
            generations.free_pools(model_runner)
            model.model.layers_to_capture, model.capture_aux_hidden_states = layers, True
            self.runner._capture = type(capture)(model)  # type: ignore[attr-defined]  # noqa: SLF001
            self.runner.set_aux_layers(AUX)
        return [logits]

    def reference(self, ids: list[list[int]]) -> list[torch.Tensor]:
        """As NeMo AutoModel's backend does: logits of every row, shifted left, then the draft's softmax and a mask."""
        forward = self.runner.forward_eagle3(flat(ids), [len(row) for row in ids])
        shape = (len(ids), len(ids[0]), -1)
        logits = self.runner.compute_logits(forward.last_hidden_states).reshape(shape)
        shifted = torch.cat([logits[:, 1:], torch.zeros_like(logits[:, :1])], dim=1)
        in_draft = self.mapping.selected_token_mask[shifted.argmax(dim=-1)]
        probs = torch.softmax(shifted[..., self.mapping.selected_token_ids].float(), dim=-1)
        return [forward.aux_hidden_states, probs, in_draft]


class HFSide(Side):
    """The HF adapter on the same checkpoint."""

    def __init__(self, model: str, draft_vocab: int) -> None:
        from eagle_target_hf import HFAdapter, HFOptions

        super().__init__(HFAdapter.load(model, HFOptions(device="cpu")), draft_vocab)


def flat(ids: list[list[int]]) -> torch.Tensor:
    """`[tokens]` of rows."""
    return torch.tensor([token for row in ids for token in row])


def peak_mb() -> float:
    """The most resident memory since the peak was started again."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MB


def main() -> None:
    kind, model, draft_vocab, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    side = {"sglang": SGLangSide, "hf": HFSide}[kind](model, int(draft_vocab))
    answer_commands({"run": side.run})


if __name__ == "__main__":
    main()
