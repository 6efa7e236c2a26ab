"""Small random checkpoints of the architectures that are compared with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = 8
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# No engine's default: one that does not read it is wrong by far.
_HEAD_DIM: dict[str, Any] = {**_SIZES, "head_dim": 32, "rope_theta": 20_000.0}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
# Class of the model without its ending, and the config. 2041 is no multiple of what SGLang pads a head to.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SIZES, "vocab_size": 2048}),
    "llama-tied": ("Llama", {**_SIZES, "vocab_size": 2048, "tie_word_embeddings": True}),
    "llama-odd": ("Llama", {**_SIZES, "vocab_size": 2041}),
    "qwen3": ("Qwen3", {**_HEAD_DIM, "vocab_size": 2048}),
    "qwen3-moe": ("Qwen3Moe", {**_HEAD_DIM, **_EXPERTS, "vocab_size": 2048}),
}


def save_checkpoint(folder: Path, architecture: str, dtype: str = "float32") -> Path:
    """Write a checkpoint and return its folder."""
    import transformers

    name, sizes = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
