"""Hidden states and logits against transformers on the same tokens, on the real engine in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_vllm import VLLMAdapter, VLLMOptions

from .models import VOCAB, save_model
from .parity import draw_sequences, mean_kl, relative_frobenius, run_engine, run_transformers

if TYPE_CHECKING:
    from pathlib import Path

AUX = (0, 3, 7)
TOLERANCE = 5e-5
CHUNKED = {"max_num_batched_tokens": 64, "max_num_seqs": 64}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("llama", {}),
        ("llama", CHUNKED),
        ("llama-tied", {}),
        ("llama-odd-vocabulary", {}),
        ("qwen3", {}),
        ("qwen3-moe", {}),
    ],
)
def test_float32_is_transformers(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = save_model(layout, tmp_path)
    sequences = draw_sequences(2011)
    runner = VLLMAdapter.load(str(checkpoint), VLLMOptions(kv_cache_memory_bytes=64 << 20, **options))
    try:
        given = run_engine(runner, sequences, AUX)
    finally:
        runner.close()

    expected = run_transformers(checkpoint, sequences, AUX, torch.float32)

    print(f"{layout} {options}: worst absolute difference {given.worst(expected):.1e}")
    assert given.worst(expected) <= TOLERANCE
    best = given.logits.argmax(-1)
    unlike = best != expected.logits.argmax(-1)
    lead = expected.logits.max(-1).values - expected.logits.gather(1, best[:, None])[:, 0]
    assert bool((lead[unlike] <= 2 * TOLERANCE).all()), "an argmax differs where there is no tie"


def test_bfloat16_is_no_further_from_float32_than_transformers(tmp_path: Path) -> None:
    checkpoint = save_model("llama", tmp_path, dtype=torch.bfloat16)
    sequences = draw_sequences(VOCAB)
    runner = VLLMAdapter.load(str(checkpoint), VLLMOptions(kv_cache_memory_bytes=64 << 20))
    try:
        given = run_engine(runner, sequences, AUX)
    finally:
        runner.close()
    exact = run_transformers(checkpoint, sequences, AUX, torch.float32)
    rounded = run_transformers(checkpoint, sequences, AUX, torch.bfloat16)

    for name in ("aux", "last", "logits"):
        ours = relative_frobenius(getattr(given, name), getattr(exact, name))
        theirs = relative_frobenius(getattr(rounded, name), getattr(exact, name))
        print(f"{name}: relative Frobenius {ours:.2e}, of transformers {theirs:.2e}")
        assert ours <= 1.1 * theirs
    ours, theirs = mean_kl(given.logits, exact.logits), mean_kl(rounded.logits, exact.logits)
    print(f"mean KL {ours:.2e}, of transformers {theirs:.2e}")
    assert ours <= 1.1 * theirs
