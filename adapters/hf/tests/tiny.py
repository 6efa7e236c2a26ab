"""Tiny seeded models of many layouts, and the explicit per-sequence oracle they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 97
HIDDEN = 32
LAYERS = 5

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEAD_DIM: dict[str, Any] = {**_LLAMA, "head_dim": 8}
_GEMMA: dict[str, Any] = {**_HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}
_MOE: dict[str, Any] = {**_HEAD_DIM, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
_LONGROPE: dict[str, Any] = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def _config(name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**values)


def _vision_config(name: str, text: Callable[[], Any], **values: Any) -> Callable[[], Any]:
    def build() -> Any:
        vision = {**_VISION, "model_type": "siglip_vision_model" if name == "Gemma3" else "clip_vision_model"}
        return getattr(transformers, f"{name}Config")(text_config=text(), vision_config=vision, **values)

    return build


# Class of the model, and what builds its config.
LAYOUTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", _config("Llama", **_LLAMA)),
    "llama-tied": ("LlamaForCausalLM", _config("Llama", **_LLAMA, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", _config("Qwen2", **_LLAMA)),
    "qwen3": ("Qwen3ForCausalLM", _config("Qwen3", **_HEAD_DIM)),
    "mistral-window": ("MistralForCausalLM", _config("Mistral", **_LLAMA, sliding_window=4)),
    "phi3": ("Phi3ForCausalLM", _config("Phi3", **_LLAMA)),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        _config("Phi3", **_LLAMA, original_max_position_embeddings=8, rope_scaling=_LONGROPE),
    ),
    "phi-bias": ("PhiForCausalLM", _config("Phi", **_LLAMA)),
    "gemma2": ("Gemma2ForCausalLM", _config("Gemma2", **_GEMMA, final_logit_softcapping=5.0)),
    "gemma3-text": ("Gemma3ForCausalLM", _config("Gemma3Text", **_GEMMA)),
    "gpt2": ("GPT2LMHeadModel", _config("GPT2", **_GPT)),
    "gptj-bias": ("GPTJForCausalLM", _config("GPTJ", **_GPT, rotary_dim=4)),
    "gpt-neox": ("GPTNeoXForCausalLM", _config("GPTNeoX", **{**_LLAMA, "num_key_value_heads": 4})),
    "opt": (
        "OPTForCausalLM",
        _config("OPT", **_LLAMA, ffn_dim=48, word_embed_proj_dim=HIDDEN),
    ),
    "bloom-alibi": (
        "BloomForCausalLM",
        _config("Bloom", vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
    ),
    "cohere": ("CohereForCausalLM", _config("Cohere", **_LLAMA, logit_scale=0.0625)),
    "granite": ("GraniteForCausalLM", _config("Granite", **_LLAMA, logits_scaling=8.0)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", _config("Qwen3Moe", **_MOE)),
    "mixtral": ("MixtralForCausalLM", _config("Mixtral", **_LLAMA, num_local_experts=LAYERS, num_experts_per_tok=2)),
    "gpt-oss": (
        "GptOssForCausalLM",
        _config("GptOss", **_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    ),
    "lfm2-hybrid": (
        "Lfm2ForCausalLM",
        _config("Lfm2", **_LLAMA, layer_types=["conv", "full_attention", "conv", "full_attention", "conv"]),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        _vision_config("Llava", _config("Llama", **_LLAMA), image_token_index=96),
    ),
    "gemma3-vision": (
        "Gemma3ForConditionalGeneration",
        _vision_config("Gemma3", _config("Gemma3Text", **_GEMMA), image_token_index=96, mm_tokens_per_image=4),
    ),
}


def build(layout: str, *, seed: int = 0, attn_implementation: str | None = None) -> Any:
    """A tiny random model in eval mode whose logits reach several units and whose biases are not zero."""
    class_name, config = LAYOUTS[layout]
    torch.manual_seed(seed)
    model_class = getattr(transformers, class_name)
    model = model_class._from_config(config(), attn_implementation=attn_implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def random_request(*seq_lens: int, seed: int = 1) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Random packed ids, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 1, (sum(seq_lens),), generator=generator), seq_lens


@torch.no_grad()
def oracle(
    model: Any, input_ids: torch.Tensor, seq_lens: tuple[int, ...], aux_layer_ids: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Aux, last hidden states and logits by the model's own forward, a sequence at a time, nothing padded."""
    aux, last, logits = [], [], []
    for ids in torch.split(input_ids, list(seq_lens)):
        output = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        aux.append(torch.cat([output.hidden_states[layer + 1][0] for layer in sorted(aux_layer_ids)], dim=-1))
        last.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    return torch.cat(aux), torch.cat(last), torch.cat(logits)
