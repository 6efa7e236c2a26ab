"""A checkpoint that is not whole is refused by name, before SGLang starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_sglang import SGLangAdapter, SGLangOptions
from safetensors.torch import load_file, save_file

from eagle_target.checkpoints.loading import check_checkpoint
from eagle_target.errors import AdapterError

from .checkpoints import ARCHITECTURES, save_checkpoint
from .engines import on_this_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]

Weights = dict[str, torch.Tensor]
DOWN = "model.layers.3.mlp.down_proj.weight"


def drop(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(name)


def in_a_wrapper(weights: Weights) -> None:
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def in_float8(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = torch.ones(())


def without_scales(weights: Weights) -> None:
    weights[DOWN] = weights[DOWN].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("lm_head.weight"), "missing.*lm_head.weight"),
        (drop(DOWN), f"missing.*{DOWN}"),
        (drop("model.norm.weight"), "missing.*model.norm.weight"),
        (in_a_wrapper, "_orig_mod"),
        (in_float8, "left out: .*_scale"),
        (without_scales, f"without a scale: {DOWN}"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    change: Callable[[Weights], object], says: str, tmp_path: Path
) -> None:
    weights = load_file(save_checkpoint(tmp_path, "llama") / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")

    with pytest.raises(AdapterError, match=f"does not load whole .*{says}.*self_check=false"):
        SGLangAdapter.load(str(tmp_path), SGLangOptions(in_process=False))


@pytest.mark.parametrize("architecture", on_this_version(ARCHITECTURES))
def test_a_whole_checkpoint_passes(architecture: str, tmp_path: Path) -> None:
    assert check_checkpoint(str(save_checkpoint(tmp_path, architecture, "bfloat16")))
