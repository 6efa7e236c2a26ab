"""Small random checkpoints of many layouts, for parity with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = 8
VOCAB = 2048
SOFT_CAP = 2.0

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Class name without its suffixes, and what differs from the sizes above.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-odd-vocabulary": ("Llama", {"vocab_size": 2011}),
    "qwen3": ("Qwen3", {}),
    "qwen3-moe": ("Qwen3Moe", {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "gemma4": (
        "Gemma4",
        {
            "global_head_dim": 32,
            "final_logit_softcapping": SOFT_CAP,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention"] * LAYERS,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 128, "n_layer": LAYERS, "n_head": 4, "n_positions": 1024}),
}


def save_model(layout: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint of a layout."""
    name, changes = LAYOUTS[layout]
    sizes = {**_SIZES, **changes}
    if name == "GPT2":
        sizes = {"vocab_size": VOCAB, **changes}
    config = getattr(transformers, "Gemma4TextConfig" if name == "Gemma4" else f"{name}Config")(**sizes)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{suffix}")._from_config(config)
    model.to(dtype).save_pretrained(folder)
    return folder
