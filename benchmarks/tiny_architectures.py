"""The smallest model of any class of transformers: its own default config, with every size made small."""

from __future__ import annotations

from typing import Any

import torch

LAYERS = 5
VOCAB = 97
HIDDEN = 32
_HEADS = 4

# What sizes are called, over all architectures.
_VALUES: dict[int, tuple[str, ...]] = {
    LAYERS: (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "depth",
        "num_blocks",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
        "num_encoder_layers",
    ),
    HIDDEN: (
        "hidden_size",
        "d_model",
        "n_embd",
        "embed_dim",
        "dim",
        "hidden_dim",
        "embedding_size",
        "word_embed_proj_dim",
        "out_hidden_size",
        "output_hidden_size",
        "text_hidden_size",
        "lru_width",
        "attention_hidden_size",
        "mm_hidden_size",
        "projection_dim",
        "proj_dim",
        "rnn_hidden_size",
        "rotary_dim_total",
        "width",
    ),
    48: (
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_hidden_size",
        "shared_intermediate_size",
        "intermediate_size_mlp",
        "block_ff_dim",
        "expert_ffn_hidden_size",
        "dense_intermediate_size",
        "mlp_dim",
    ),
    _HEADS: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "attention_heads",
        "linear_num_value_heads",
        "mamba_n_heads",
        "mamba_num_heads",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_expert",
        "linear_conv_kernel_dim",
        "index_n_heads",
        "rotary_dim",
        "num_hash_buckets",
    ),
    2: (
        "num_key_value_heads",
        "n_kv_heads",
        "num_kv_heads",
        "multi_query_group_num",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "linear_num_key_heads",
        "num_key_value_groups",
        "expand",
        "mamba_expand",
        "num_global_key_value_heads",
        "num_attention_groups",
    ),
    8: (
        "head_dim",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "state_size",
        "ssm_state_size",
        "mamba_d_state",
        "index_head_dim",
        "kv_channels",
        "attention_head_dim",
        "d_kv",
        "global_head_dim",
        "hidden_size_per_layer_input",
        "swa_head_dim",
        "swa_v_head_dim",
        "time_step_rank",
        "index_topk",
        "laurel_rank",
        "head_size",
    ),
    16: (
        "moe_intermediate_size",
        "q_lora_rank",
        "kv_lora_rank",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "expert_hidden_dim",
        "mamba_d_head",
        "mamba_head_dim",
        "o_lora_rank",
        "sliding_window",
        "attention_window_size",
        "attention_chunk_size",
        "chunk_size",
        "mamba_chunk_size",
        "share_expert_dim",
        "moe_latent_size",
    ),
    1: (
        "n_group",
        "topk_group",
        "mamba_n_groups",
        "n_groups",
        "num_groups",
        "first_k_dense_replace",
        "n_shared_experts",
        "num_nextn_predict_layers",
        "num_kv_shared_layers",
    ),
    VOCAB: ("vocab_size", "vocab_size_per_layer_input", "audio_vocab_size", "image_vocab_size"),
    128: ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx", "max_seq_len"),
}
_SIZES = {name: value for value, names in _VALUES.items() for name in names}
_IMAGE = ("image_size", "img_size", "input_size", "max_image_size")

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_SAME_HEADS = {"num_key_value_heads": _HEADS}

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 0]}}
_DYNAMIC = {"rope_parameters": _ROPE, "head_dim": 8}

# What a model needs besides, by `model_type`.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
    },
    "emu3_text_model": {"pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "intermediate_size": [48] * LAYERS,
    },
    # With few heads many scores are exactly 0, and which of them are chosen depends on the shape of the batch.
    "glm_moe_dsa": {"index_n_heads": 16},
    "deepseek_v32": {"index_n_heads": 16},
    "glm4v_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "glm4v_moe_text": _HALF_MROPE,
    "hunyuan_v1_dense": _DYNAMIC,
    "hunyuan_v1_moe": {**_DYNAMIC, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_text": _DYNAMIC,
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"]},
    "llama4_text": {"pad_token_id": 0},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "ministral": _DYNAMIC,
    "nemotron": {**_SAME_HEADS, "head_dim": 8},
    "paddleocr_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(config_class: type[Any]) -> Any:
    """A config of the class with small sizes, also in the configs inside it."""
    config = config_class()
    return config_class.from_dict(_shrink(config.to_dict()))


def tiny_model(model_class: type[Any], config: Any) -> Any:
    """A random model in eval mode whose logits reach several units and whose biases are not zero."""
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.float32)  # noqa: SLF001 - the only way from a config to a class
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def _shrink(values: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    depths = {value for name, value in values.items() if name in _VALUES[LAYERS] and isinstance(value, int)}
    for name, value in values.items():
        small[name] = _shrink_value(str(name), value, depths)
    patch = values.get("patch_size")
    for name in _IMAGE:
        if isinstance(values.get(name), int) and isinstance(patch, int):
            small[name] = 2 * patch
    if "kv_lora_rank" in values:
        small |= _SAME_HEADS
    for name, value in CHANGES.get(str(values.get("model_type")), {}).items():
        kept = small.get(name)
        small[name] = {**kept, **value} if isinstance(kept, dict) and isinstance(value, dict) else value
    return small


def _shrink_value(name: str, value: Any, depths: set[int]) -> Any:
    if isinstance(value, dict):
        if value and name == "per_layer_config":
            # By number: the layers of another kind are among the last here.
            return {LAYERS - 1: _shrink(next(iter(value.values())))}
        return _shrink(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if name in _VALUES[LAYERS]:
            return LAYERS if value > 0 else value
        if name in _SIZES:
            return min(value, _SIZES[name]) if value > 0 else value
        if name.endswith(("token_id", "token_index")):
            return value if value < VOCAB else VOCAB - 3
    if isinstance(value, list):
        return _shrink_list(name, value, depths)
    return value


def _shrink_list(name: str, value: list[Any], depths: set[int]) -> list[Any]:
    if name.endswith("token_id"):
        return [entry if entry < VOCAB else VOCAB - 3 for entry in value]
    if name == "mrope_section":
        # Their sum is half of a head.
        return [2, 1, 1]
    if len(value) in depths and len(value) > LAYERS:
        # One of each kind, and the first of the others.
        kinds = [value.index(kind) for kind in dict.fromkeys(map(str, value)) if kind in value]
        others = [index for index in range(len(value)) if index not in kinds]
        return [value[index] for index in sorted((kinds + others)[:LAYERS])]
    return value
