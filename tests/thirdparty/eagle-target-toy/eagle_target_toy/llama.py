"""The engine: Llama's forward pass, written out. tokens = one sequence's.

RMSNorm, rotary embeddings, grouped-query attention, SwiGLU. https://arxiv.org/abs/2302.13971
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

if TYPE_CHECKING:
    from pathlib import Path


class UnsupportedCheckpoint(Exception):
    """The checkpoint is not one this engine can run."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """What config.json says."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_seq_len: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def read(cls, folder: Path) -> LlamaShape:
        """Read config.json.

        Raises:
            UnsupportedCheckpoint: no Llama, or one with scaled rotary embeddings or biases.
        """
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UnsupportedCheckpoint(f"{folder} has no readable config.json: {error}") from error
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", "default")
        biases = config.get("attention_bias") or config.get("mlp_bias")
        if config.get("model_type") != "llama" or kind != "default" or biases:
            raise UnsupportedCheckpoint(
                f"{folder} is {config.get('model_type')!r} with rope {kind!r}: plain Llama checkpoints are supported"
            )
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            max_seq_len=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            tied=bool(config.get("tie_word_embeddings")),
        )


class Llama:
    """A loaded checkpoint. Runs one sequence at a time, so what shares a batch never changes a bit."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.shape = LlamaShape.read(folder)
        self._weights = _read_weights(folder)
        if dtype is not None:
            self._weights = {name: weight.to(dtype) for name, weight in self._weights.items()}
        self.embedding = self._weight("model.embed_tokens")
        self.head = self.embedding if self.shape.tied else self._weight("lm_head")
        self.dtype = self.embedding.dtype

    def run(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """`[tokens]` -> the output of every layer, and the normed last, `[tokens, hidden]` each."""
        rotation = _rotation(len(ids), self.shape, self.dtype)
        states, outputs = self.embedding[ids], []
        for layer in range(self.shape.layers):
            states = states + self._attend(layer, states, rotation)
            states = states + self._feed_forward(layer, states)
            outputs.append(states)
        return outputs, self._norm("model.norm", states)

    def _attend(self, layer: int, states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        prefix = f"model.layers.{layer}"
        normed = self._norm(f"{prefix}.input_layernorm", states)
        query, key, value = (
            self._linear(f"{prefix}.self_attn.{name}_proj", normed)
            .view(len(states), -1, self.shape.head_dim)
            .transpose(0, 1)
            for name in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, rotation)[None],
            _rotate(key, rotation)[None],
            value[None],
            is_causal=True,
            enable_gqa=self.shape.kv_heads != self.shape.heads,
        )
        return self._linear(f"{prefix}.self_attn.o_proj", mixed[0].transpose(0, 1).reshape(len(states), -1))

    def _feed_forward(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{layer}"
        normed = self._norm(f"{prefix}.post_attention_layernorm", states)
        gate = functional.silu(self._linear(f"{prefix}.mlp.gate_proj", normed))
        return self._linear(f"{prefix}.mlp.down_proj", gate * self._linear(f"{prefix}.mlp.up_proj", normed))

    def _linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self._weight(name))

    def _norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.rms_norm_eps)
        return self._weight(name) * wide.to(states.dtype)

    def _weight(self, name: str) -> torch.Tensor:
        try:
            return self._weights[f"{name}.weight"]
        except KeyError:
            raise UnsupportedCheckpoint(f"the checkpoint has no {name}.weight") from None


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedCheckpoint(f"{folder} has no .safetensors files")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights.update(load_file(file))
    return weights


def _rotation(tokens: int, shape: LlamaShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, `[tokens, head_dim]`."""
    powers = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), shape.rope_theta**-powers)
    both = torch.cat([angles, angles], dim=1)
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate(heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate `[heads, tokens, head_dim]` by position."""
    cosine, sine = rotation
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
