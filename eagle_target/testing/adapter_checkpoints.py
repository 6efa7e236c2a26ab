"""A checkpoint that is not whole is refused at load by name, whatever the engine would make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_target.errors import AdapterError
from eagle_target.testing.adapter_suite import AdapterSuite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Weights = dict[str, torch.Tensor]
DOWN = "model.layers.3.mlp.down_proj.weight"


def _without(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(name)


def _in_a_wrapper(weights: Weights) -> None:
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def _in_float8(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = torch.ones(())


def _without_scales(weights: Weights) -> None:
    weights[DOWN] = weights[DOWN].to(torch.float8_e4m3fn)


class WholeCheckpointConformance(AdapterSuite):
    """For adapters of engines that read a checkpoint's own files; inherited beside `AdapterConformance`."""

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (_without("lm_head.weight"), "lm_head.weight"),
            (_without(DOWN), DOWN),
            (_without("model.norm.weight"), "model.norm.weight"),
            (_in_a_wrapper, "_orig_mod"),
            (_in_float8, "_scale"),
            (_without_scales, DOWN),
        ],
        ids=["no-head", "no-weight-of-a-layer", "no-norm", "wrapped", "float8-beside-scales", "float8-without-scales"],
    )
    def test_a_checkpoint_that_is_not_whole_is_refused(
        self, change: Callable[[Weights], object], named: str, tmp_path: Path
    ) -> None:
        checkpoint = self.make_checkpoint(tmp_path / "target")
        weights = load_file(checkpoint / "model.safetensors")
        change(weights)
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

        with pytest.raises(AdapterError, match=f"does not load whole .*{named}"):
            self.load(checkpoint)
