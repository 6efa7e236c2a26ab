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
from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.contract.target import default_eagle3_aux_layer_ids
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 32_000
DRAFT_VOCAB = 8_000
LENGTHS = (192, 64, 128, 160, 96, 128, 192, 64)
KV_CACHE_BYTES = 512 << 20
MAX_BATCHED_TOKENS = 2048


def save_target(folder: Path, layers: int) -> None:
    """Write a random Llama of 8.65 million parameters a layer and 24.6 million of the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
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
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }


def generate_one(engine: Any, request: SupervisionRequest) -> None:
    """Run the prompts with one generated token each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids.tolist()} for ids in torch.split(request.input_ids, list(LENGTHS))]
    engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), use_tqdm=False)


def prepare_plain(folder: str, layers: int) -> Callable[[SupervisionRequest], float]:
    """Plain vLLM as it comes, compiled: one generated token a prompt."""
    from vllm import LLM

    del layers
    engine = LLM(**engine_arguments(folder))

    def run(request: SupervisionRequest) -> float:
        generate_one(engine, request)
        return 0.0

    return run


def prepare_adapter(folder: str, layers: int, engine: str) -> Callable[[SupervisionRequest], float]:
    """An adapter of this project."""
    from eagle_target.targets import load_runner

    vllm_options = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "max_num_batched_tokens": MAX_BATCHED_TOKENS}
    options = {"dtype": "float32", **(vllm_options if engine == "vllm" else {})}
    aux_layer_ids = default_eagle3_aux_layer_ids(layers)
    runner = load_runner(engine, folder, options, aux_layer_ids)
    runner.set_aux_layers(aux_layer_ids)

    def run(request: SupervisionRequest) -> float:
        sink = PackedTensors()
        compute_supervision(runner, request, sink)
        return float(sink["target_logsumexp"].mean())

    return run


def prepare_reference(folder: str, layers: int) -> Callable[[SupervisionRequest], float]:
    """The reference's way: a file a sample through the connector, the head rebuilt outside from the checkpoint.

    vLLM's own file connector needs CUDA streams, so ours hands the states over and this writes them.
    """
    from eagle_target_vllm.connector import connector_arguments
    from safetensors.torch import load_file, save_file
    from vllm import LLM
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    engine = LLM(**engine_arguments(folder), **connector_arguments(default_eagle3_aux_layer_ids(layers), layers))
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


SIDES: dict[str, Callable[[str, int], Callable[[SupervisionRequest], float]]] = {
    "plain": prepare_plain,
    "ours": partial(prepare_adapter, engine="vllm"),
    "hf": partial(prepare_adapter, engine="hf"),
    "reference": prepare_reference,
}


def main() -> None:
    """Answer `save`, or load a side and answer `run`."""
    side, folder, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if side == "save":
        save_target(Path(folder), layers)
        answer_commands({})
        return
    request = draw_request()
    run_prompts = SIDES[side](folder, layers)

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        checksum = run_prompts(request)
        return {"seconds": time.perf_counter() - started, "checksum": checksum}

    answer_commands({"run": run})


if __name__ == "__main__":
    main()
