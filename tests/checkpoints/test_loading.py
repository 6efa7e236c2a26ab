"""A checkpoint is judged from names and shapes, whatever engine will load it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_target.checkpoints.loading import check_checkpoint
from eagle_target.errors import AdapterError
from eagle_target.testing.tiny import save_tiny_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Weights = dict[str, torch.Tensor]
QUERY = "model.layers.1.self_attn.q_proj"


def in_float8(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = torch.ones(())


def in_integers(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights.pop(name)
        for part in ("qweight", "qzeros", "scales"):
            weights[name.replace("weight", part)] = torch.ones(2, 2, dtype=torch.int32)


def in_4_bits(weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights[name].shape
        weights[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        weights[f"{name}_scale"] = torch.ones(2)
        weights[f"{name}_scale_2"] = torch.ones(())


def save(folder: Path, change: Callable[[Weights], object], method: str | None = None) -> str:
    save_tiny_target(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    if method is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_passes(tied: bool, tmp_path: Path) -> None:
    assert check_checkpoint(str(save_tiny_target(tmp_path, tied=tied)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop("lm_head.weight"), "missing.*lm_head.weight"),
        (lambda weights: weights.pop(f"{QUERY}.weight"), f"missing.*{QUERY}.weight"),
        (
            lambda weights: weights.update({f"{QUERY}.weight": torch.ones(3)}),
            rf"another shape.*{QUERY}.weight: \[3\], not",
        ),
        (lambda weights: weights.update({f"{QUERY}.weight_scale": torch.ones(3)}), f"left out: {QUERY}.weight_scale"),
        (lambda weights: weights.update({f"{QUERY}.bias": torch.ones(3)}), f"no place for: {QUERY}.bias"),
        (in_float8, "left out: .*weight_scale"),
        (in_integers, "left out: .*qweight"),
        (in_4_bits, "left out: .*weight_scale"),
    ],
)
def test_what_is_not_whole_is_refused_with_the_caller_s_remedy(
    change: Callable[[Weights], object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"does not load whole .*{says}.* Ask somebody"):
        check_checkpoint(save(tmp_path, change), remedy="Ask somebody")


@pytest.mark.parametrize(
    ("quantise", "method"), [(in_float8, "modelopt"), (in_integers, "awq"), (in_4_bits, "modelopt_fp4")]
)
@pytest.mark.parametrize("missing", [None, "lm_head", "model.norm", QUERY])
def test_of_a_quantised_checkpoint_everything_has_to_be_there_in_some_form(
    quantise: Callable[[Weights], object], method: str, missing: str | None, tmp_path: Path
) -> None:
    def change(weights: Weights) -> None:
        quantise(weights)
        for name in [name for name in weights if missing and name.startswith(missing)]:
            weights.pop(name)

    path = save(tmp_path, change, method)

    if missing is None:
        assert check_checkpoint(path)
    else:
        with pytest.raises(AdapterError, match=f"missing.*{missing}.weight"):
            check_checkpoint(path)


@pytest.mark.parametrize("name", ["somebody/has-not-been-fetched", "{folder}"])
def test_what_is_not_here_is_not_judged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with caplog.at_level(logging.INFO, logger="eagle_target"):
        assert not check_checkpoint(name.format(folder=tmp_path))

    assert "was not checked for missing weights" in caplog.text


def test_an_index_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path, lambda weights: None)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(AdapterError, match=r"model\.safetensors\.index\.json is no index of a checkpoint, copy it"):
        check_checkpoint(path)
