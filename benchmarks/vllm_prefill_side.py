"""One side of `vllm_prefill`, in a process of vLLM's environment: runs the same prompts its own way.

tokens = of all prompts; rows = those that bear loss.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import answer_commands
from eagle_target.rows import PackedTensors
from eagle_target.supervision import SupervisionRequest, compute_supervision
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 32_000
DRAFT_VOCAB = 8_000
LAYERS = 24
AUX = (1, 11, 20)
LENGTHS = (384, 128, 256, 320, 192, 256, 384, 128)
KV_CACHE_BYTES = 512 << 20


def save_target(folder: Path) -> None:
    """Write a random Llama of 181 million parameters, of which the head has 25."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def draw_request() -> SupervisionRequest:
    """The prompts, every second row of them supervised."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    return SupervisionRequest(
        input_ids=torch.randint(0, VOCAB, (tokens,), generator=draw),
        seq_lens=LENGTHS,
        row_mask=torch.arange(tokens) % 2 == 0,
        mapping=shuffled_mapping(VOCAB, DRAFT_VOCAB),
    )


def engine_arguments(folder: str) -> dict[str, Any]:
    """What all sides that run vLLM tell it."""
    return {
        "model": folder,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }


def generate_one(engine: Any, request: SupervisionRequest) -> None:
    """Run the prompts with one generated token each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids.tolist()} for ids in torch.split(request.input_ids, list(LENGTHS))]
    engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), use_tqdm=False)


def prepare_plain(folder: str) -> Callable[[SupervisionRequest], float]:
    """Plain vLLM as it comes, compiled: one generated token a prompt."""
    from vllm import LLM

    engine = LLM(**engine_arguments(folder))

    def run(request: SupervisionRequest) -> float:
        generate_one(engine, request)
        return 0.0

    return run


def prepare_adapter(folder: str, engine: str) -> Callable[[SupervisionRequest], float]:
    """An adapter of this project."""
    from eagle_target.targets import load_runner

    vllm_options = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "max_num_batched_tokens": 2048}
    runner = load_runner(engine, folder, {"dtype": "float32", **(vllm_options if engine == "vllm" else {})})
    runner.set_aux_layers(AUX)

    def run(request: SupervisionRequest) -> float:
        sink = PackedTensors()
        compute_supervision(runner, request, sink)
        return float(sink["target_logsumexp"].mean())

    return run


def prepare_reference(folder: str) -> Callable[[SupervisionRequest], float]:
    """The reference's way: a file a sample through the connector, the head rebuilt outside from the checkpoint.

    vLLM's own file connector needs CUDA streams, so ours hands the states over and this writes them.
    """
    from eagle_target_vllm.connector import connector_arguments
    from safetensors.torch import load_file, save_file
    from vllm import LLM
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engine = LLM(**engine_arguments(folder), **connector_arguments(AUX, LAYERS))
    files = Path(tempfile.mkdtemp(prefix="states-", dir=folder))
    saved: list[str] = []

    def save(request_id: str, states: torch.Tensor) -> None:
        saved.append(request_id)
        save_file({"hidden_states": states.contiguous()}, files / request_id)

    connector: Any = get_kv_transfer_group()
    connector.receiver = save
    weights = load_file(Path(folder) / "model.safetensors")
    norm, head = weights["model.norm.weight"], weights["lm_head.weight"]

    def run(request: SupervisionRequest) -> float:
        saved.clear()
        generate_one(engine, request)
        while len(saved) < len(LENGTHS):
            engine.llm_engine.engine_core.get_output()
        # Requests end in the order of their lengths: ids start with their number.
        states = [load_file(files / name)["hidden_states"] for name in sorted(saved, key=_number)]
        total = 0.0
        for part, mask in zip(states, torch.split(request.row_mask, list(LENGTHS)), strict=True):
            total += _project(part, mask, norm, head, request)
        for name in saved:
            (files / name).unlink()
        return total / int(request.row_mask.sum())

    return run


def _number(request_id: str) -> int:
    return int(request_id.partition("-")[0])


@torch.no_grad()
def _project(
    states: torch.Tensor, mask: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, request: SupervisionRequest
) -> float:
    last = states[:, -1].float()
    last = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
    logits = torch.nn.functional.linear(last, head)
    if request.mapping is None:
        raise ValueError("the request has no mapping")
    in_draft = request.mapping.selected_token_mask[logits.argmax(-1)]
    probs = torch.softmax(logits[:, request.mapping.selected_token_ids], -1)
    del in_draft, probs
    return float(torch.logsumexp(logits, -1)[mask].sum())


SIDES: dict[str, Callable[[str], Callable[[SupervisionRequest], float]]] = {
    "plain": prepare_plain,
    "ours": partial(prepare_adapter, engine="vllm"),
    "hf": partial(prepare_adapter, engine="hf"),
    "reference": prepare_reference,
}


def main() -> None:
    """Answer `save`, or load a side and answer `run`."""
    side, folder = sys.argv[1:]
    if side == "save":
        save_target(Path(folder))
        answer_commands({})
        return
    request = draw_request()
    run_prompts = SIDES[side](folder)

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        checksum = run_prompts(request)
        return {"seconds": time.perf_counter() - started, "checksum": checksum}

    answer_commands({"run": run})


if __name__ == "__main__":
    main()
