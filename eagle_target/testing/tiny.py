"""Targets that are small, fast and deterministic, for tests of plugins, servers and trainers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
from eagle_target.contract.target import TargetInfo, default_eagle3_aux_layer_ids, validate_aux_layer_ids
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import AdapterError, ContractError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

KEPT_FORWARDS = 1000


def save_tiny_target(
    path: str | os.PathLike[str],
    *,
    tied: bool = False,
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 211,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random LlamaForCausalLM checkpoint that is the same for the same arguments, and return its folder.

    The vocabulary is odd, so that an engine that pads its head shows it; the weights are large enough that logits
    differ from token to token.

    Args:
        path: folder to write to. tied: whether the LM head is the input embedding.
        layers, hidden, heads, kv_heads, vocab: the target's sizes. dtype: as torch spells it. seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(path)
    return Path(path)


def shuffled_mapping(vocab_size: int, draft_vocab_size: int, *, seed: int = 0) -> VocabMapping:
    """Return a vocabulary mapping whose ids are random and not ascending, the same for the same arguments.

    Raises:
        ContractError: the draft vocabulary has fewer than two ids, which are always ascending.
    """
    if draft_vocab_size < 2:
        raise ContractError(f"draft_vocab_size must be at least 2 for ids that do not ascend, got {draft_vocab_size}")
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:draft_vocab_size].clone()
    if bool((ids.diff() > 0).all()):
        ids = ids.flip(0)
    return VocabMapping.from_ids(ids, vocab_size)


class EmbeddingRunner(TargetRunner):
    """A target in plain torch on the CPU: a causal mixture of embeddings instead of attention.

    A hidden state depends on every token before it in its sequence and on their order, so a leak between sequences
    or a wrong shift changes it. Each sequence is computed by itself and in float64, so its values have the same bits
    whatever shares the forward.

    Args:
        vocab_size, hidden_size, num_layers: the target's sizes.
        dtype: of weights, hidden states and logits. seed: of the weights.
        delay: seconds that each forward takes longer.
        bias: whether the LM head has one. logit_scale, soft_cap: see `DraftHead`.
        plain_head: False for a head that `draft_head` cannot describe.
        max_seq_len: the longest sequence the target claims to take.
        concurrent_head: whether it says that `compute_logits` may run beside a forward; it may.

    Attributes:
        forwards: `seq_lens` of the latest `KEPT_FORWARDS` forwards, in order. closed: whether `close` was called.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 211,
        hidden_size: int = 16,
        num_layers: int = 8,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        delay: float = 0.0,
        bias: bool = False,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
        plain_head: bool = True,
        max_seq_len: int | None = None,
        concurrent_head: bool = True,
    ) -> None:
        self._concurrent_head = concurrent_head
        self._info = TargetInfo(
            model=f"embedding-{vocab_size}x{hidden_size}x{num_layers}-seed{seed}",
            num_layers=num_layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            dtype=str(dtype).removeprefix("torch."),
            device="cpu",
            engine="embedding",
            engine_version="1",
            max_seq_len=max_seq_len,
        )
        draw = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self._embedding = torch.randn(vocab_size, hidden_size, generator=draw).to(dtype)
        self._layers = torch.randn(num_layers, hidden_size, hidden_size, generator=draw, dtype=torch.float64)
        self._layers /= hidden_size**0.5
        self._head = DraftHead(
            weight=torch.randn(vocab_size, hidden_size, generator=draw).to(dtype),
            bias=torch.randn(vocab_size, generator=draw).to(dtype) if bias else None,
            logit_scale=logit_scale,
            soft_cap=soft_cap,
        )
        self._plain_head = plain_head
        self._delay = delay
        self._aux_layer_ids = default_eagle3_aux_layer_ids(num_layers) if num_layers >= 7 else (0, 1, 2)
        self._busy = threading.Lock()
        self.forwards: list[tuple[int, ...]] = []
        self.closed = False

    @property
    def info(self) -> TargetInfo:
        """Facts about the target."""
        return self._info

    @property
    def aux_layer_ids(self) -> tuple[int, int, int]:
        """The layers that are captured."""
        return self._aux_layer_ids

    @property
    def concurrent_head(self) -> bool:
        """As it was told to say."""
        return self._concurrent_head

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Choose the three layers to capture."""
        self._aux_layer_ids = validate_aux_layer_ids(aux_layer_ids, self.info.num_layers)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """Run each sequence by itself.

        Raises:
            AdapterError: the runner is closed, or another thread is in it.
        """
        self._check_open()
        if not self._busy.acquire(blocking=False):
            raise AdapterError("two threads are in EmbeddingRunner.forward_eagle3: a runner takes one at a time")
        try:
            self.forwards.append(tuple(seq_lens))
            del self.forwards[:-KEPT_FORWARDS]
            if self._delay:
                time.sleep(self._delay)
            states = [self._run_sequence(ids) for ids in torch.split(input_ids, list(seq_lens))]
        finally:
            self._busy.release()
        return TargetForward(
            aux_hidden_states=torch.cat([aux for aux, _ in states]),
            last_hidden_states=torch.cat([last for _, last in states]),
        )

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> `[n, vocab]`."""
        self._check_open()
        bias = None if self._head.bias is None else self._head.bias.double()
        head = DraftHead(
            weight=self._head.weight.double(),
            bias=bias,
            logit_scale=self._head.logit_scale,
            soft_cap=self._head.soft_cap,
        )
        return head.compute_logits(last_hidden_states.double()).to(self._dtype)

    def input_embedding_weight(self) -> torch.Tensor:
        """The input embedding, `[vocab, hidden]`."""
        self._check_open()
        return self._embedding

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """Rows of the head; None for a runner with `plain_head=False`."""
        self._check_open()
        if not self._plain_head:
            return None
        return DraftHead(
            weight=self._head.weight[token_ids],
            bias=None if self._head.bias is None else self._head.bias[token_ids],
            logit_scale=self._head.logit_scale,
            soft_cap=self._head.soft_cap,
        )

    def close(self) -> None:
        """Refuse what comes after."""
        self.closed = True

    def _run_sequence(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self._embedding[ids].double()
        steps = torch.arange(1, len(ids) + 1, dtype=torch.float64)[:, None]
        mixed = tokens + (tokens * steps).cumsum(0) / steps.cumsum(0)
        states = [torch.tanh(mixed @ weight).to(self._dtype) for weight in self._layers]
        return torch.cat([states[layer] for layer in self._aux_layer_ids], dim=1), states[-1]

    def _check_open(self) -> None:
        if self.closed:
            raise AdapterError("this EmbeddingRunner is closed: build a new one")
