"""Hidden states, logits and masks against transformers on the same tokens, on the real engine in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_vllm import VLLMAdapter, VLLMOptions

from eagle_target.errors import AdapterError
from eagle_target.testing.adapter_oracle import relative_error
from eagle_target.testing.tiny import shuffled_mapping

from .models import LAYOUTS, SOFT_CAP, VOCAB, save_model
from .parity import (
    assert_no_further,
    count_unlike_masks,
    draw_sequences,
    mean_kl,
    run_engine,
    run_transformers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target_vllm import VLLMTargetRunner

AUX = (0, 3, 7)
TOLERANCE = 5e-5
DRAFT_VOCAB = 700
EAGER = {"enforce_eager": True}
CHUNKED = {"max_num_batched_tokens": 64, "max_num_seqs": 64}


def load(checkpoint: Path, **options: Any) -> VLLMTargetRunner:
    return VLLMAdapter.load(str(checkpoint), VLLMOptions(kv_cache_memory_bytes=64 << 20, **options), AUX)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("llama", {}),
        ("llama", {**CHUNKED, **EAGER}),
        ("llama-tied", EAGER),
        ("llama-odd-vocabulary", EAGER),
        ("qwen3", EAGER),
        ("qwen3-moe", EAGER),
        ("granite", EAGER),
    ],
)
def test_float32_is_transformers(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = save_model(layout, tmp_path)
    sequences = draw_sequences(2011)
    expected = run_transformers(checkpoint, sequences, AUX, torch.float32)
    mapping = shuffled_mapping(LAYOUTS[layout][1].get("vocab_size", VOCAB), DRAFT_VOCAB)
    runner = load(checkpoint, **options)
    try:
        given = run_engine(runner, sequences, AUX)
        unlike = count_unlike_masks(runner, sequences, expected, mapping, AUX, TOLERANCE)
        if not options:
            with pytest.raises(AdapterError, match="--aux-layer-ids"):
                runner.set_aux_layers((1, 2, 3))
    finally:
        runner.close()

    worst = given.worst(expected)
    print(f"{layout} {options}: worst absolute difference {worst:.1e}, {unlike} masks differ, all at ties")
    assert worst <= TOLERANCE


def test_a_soft_capped_head_is_the_engines_own(tmp_path: Path) -> None:
    """Gemma 4: its states are off by some 3e-5 of their size, so the head is compared on the engine's own states."""
    checkpoint = save_model("gemma4", tmp_path)
    sequences = draw_sequences(VOCAB)
    expected = run_transformers(checkpoint, sequences, AUX, torch.float32)
    runner = load(checkpoint, **EAGER)
    try:
        given = run_engine(runner, sequences, AUX)
        ids = shuffled_mapping(VOCAB, DRAFT_VOCAB).selected_token_ids
        head = runner.draft_head(ids)
        weight = runner.input_embedding_weight()
    finally:
        runner.close()

    raw = given.last @ weight.T
    assert float(raw.abs().max()) > SOFT_CAP
    assert float((given.logits - SOFT_CAP * torch.tanh(raw / SOFT_CAP)).abs().max()) <= TOLERANCE
    assert head is not None
    assert head.soft_cap == SOFT_CAP
    assert float((head.compute_logits(given.last) - given.logits[:, ids]).abs().max()) <= TOLERANCE
    for name in ("aux", "last", "logits"):
        assert relative_error(getattr(given, name), getattr(expected, name)) <= 1e-4


def test_bfloat16_is_no_further_from_float32_than_transformers(tmp_path: Path) -> None:
    """Over 4 500 tokens: a mean over fewer depends on which of two equally good roundings is luckier."""
    checkpoint = save_model("llama", tmp_path, dtype=torch.bfloat16)
    sequences = [ids for seed in range(4) for ids in draw_sequences(VOCAB, seed=seed)]
    runner = load(checkpoint)
    try:
        given = run_engine(runner, sequences, AUX)
    finally:
        runner.close()
    exact = run_transformers(checkpoint, sequences, AUX, torch.float32)
    rounded = run_transformers(checkpoint, sequences, AUX, torch.bfloat16)

    assert_no_further(given, rounded, exact)
    ours, theirs = mean_kl(given.logits, exact.logits), mean_kl(rounded.logits, exact.logits)
    print(f"mean KL {ours:.2e}, of transformers {theirs:.2e}")
    assert ours <= theirs
