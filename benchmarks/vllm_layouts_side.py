"""One process layout of `vllm_layouts`, in a process of vLLM's environment."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from benchmarks.processes import answer_commands
from benchmarks.vllm_prefill_side import VOCAB
from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.targets import load_runner
from eagle_target.testing.tiny import shuffled_mapping

PROMPTS = 8
PROMPT_TOKENS = 256
DRAFT_VOCAB = 8_000
AUX = (1, 3, 4)


def draw_request() -> SupervisionRequest:
    """Prompts of one length, every second row of them supervised."""
    tokens = PROMPTS * PROMPT_TOKENS
    return SupervisionRequest(
        input_ids=torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(0)),
        seq_lens=(PROMPT_TOKENS,) * PROMPTS,
        row_mask=torch.arange(tokens) % 2 == 0,
        mapping=shuffled_mapping(VOCAB, DRAFT_VOCAB),
    )


def main() -> None:
    """Load a layout and answer `run`, and `run_fresh`, which uses no block of memory twice."""
    from eagle_target_vllm import blocks

    folder, process, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    options = {"process": process, "tensor_parallel_size": workers, "dtype": "float32", "enforce_eager": True}
    started = time.perf_counter()
    runner = load_runner("vllm", folder, {**options, "kv_cache_memory_bytes": 512 << 20}, AUX)
    load_seconds = time.perf_counter() - started
    runner.set_aux_layers(AUX)
    request = draw_request()
    kept = blocks.KEPT_BLOCKS

    def run(kept_blocks: int) -> dict[str, Any]:
        blocks.KEPT_BLOCKS = kept_blocks
        sink = PackedTensors()
        began = time.perf_counter()
        compute_supervision(runner, request, sink)
        return {
            "seconds": time.perf_counter() - began,
            "checksum": float(sink["target_logsumexp"].mean()),
            "load_seconds": load_seconds,
        }

    answer_commands({"run": lambda: run(kept), "run_fresh": lambda: run(0)})
    runner.close()


if __name__ == "__main__":
    main()
