"""Whole checkpoints pass the check before vLLM starts, which an option turns off; what is refused, the suites try."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_vllm import VLLMAdapter, VLLMOptions
from safetensors.torch import load_file, save_file

from eagle_target.checkpoints.loading import check_checkpoint

from .models import LAYOUTS, save_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_checkpoint_passes(layout: str, tmp_path: Path) -> None:
    assert check_checkpoint(str(save_model(layout, tmp_path, dtype=torch.bfloat16)))


def test_without_the_check_vllm_starts_on_it(tmp_path: Path) -> None:
    weights = load_file(save_model("llama", tmp_path) / "model.safetensors")
    weights.pop("model.layers.3.mlp.down_proj.weight")
    save_file(weights, tmp_path / "model.safetensors")

    VLLMAdapter.load(
        str(tmp_path), VLLMOptions(enforce_eager=True, kv_cache_memory_bytes=64 << 20, self_check=False)
    ).close()
