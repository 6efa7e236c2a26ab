"""A checkpoint that does not load whole is refused by name; a whole one, old or odd as it may be, loads as before."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_hf import HFAdapter, HFOptions
from safetensors.torch import load_file, save_file

from eagle_target.errors import AdapterError

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Weights = dict[str, torch.Tensor]
LAYER = "model.layers.3"
QUERY = f"{LAYER}.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
DOWN = f"{LAYER}.mlp.down_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def damage(folder: Path, change: Callable[[Weights], object], layout: str = "llama") -> str:
    """Save a tiny checkpoint with changed weights."""
    tiny.build(layout).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return str(folder)


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def load(path: str | Path, **options: Any) -> Any:
    return HFAdapter.load(str(path), HFOptions(device="cpu", **options))


def drop(*names: str) -> Callable[[Weights], object]:
    return lambda weights: [weights.pop(name) for name in names]


def add(**tensors: torch.Tensor) -> Callable[[Weights], object]:
    return lambda weights: weights.update(tensors)


def rename(change: Callable[[str], str]) -> Callable[[Weights], object]:
    def apply(weights: Weights) -> None:
        for name in list(weights):
            weights[change(name)] = weights.pop(name)

    return apply


def add_prediction_layer(weights: Weights) -> None:
    """Put what predicts a second token behind the last layer, as DeepSeek does."""
    weights["model.layers.5.eh_proj.weight"] = torch.ones(32, 64)
    for name in [name for name in weights if name.startswith(LAYER)]:
        weights[name.replace("layers.3", "layers.5")] = weights[name].clone()


def to_float8(weights: Weights, *, scale: str | None = None) -> None:
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        if scale is not None:
            weights[name.removesuffix(".weight") + scale] = torch.ones(1, 1)


def as_packed(*endings: str) -> Callable[[Weights], object]:
    """Put what a 4-bit form has in the place of one weight."""

    def change(weights: Weights) -> None:
        weights.pop(DOWN)
        for ending in endings:
            weights[DOWN.removesuffix(".weight") + ending] = torch.ones(4, 4, dtype=torch.uint8)

    return change


def assert_refused(checkpoint: str, says: str) -> None:
    with pytest.raises(AdapterError) as caught:
        load(checkpoint)

    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "stored", "name"),
    [
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", f"{LAYER}.input_layernorm.weight", f"{LAYER}.input_layernorm.weight"),
        ("llama", DOWN, DOWN),
        ("llama-tied", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("qwen2", f"{LAYER}.self_attn.k_proj.bias", f"{LAYER}.self_attn.k_proj.bias"),
        ("qwen3", f"{LAYER}.self_attn.q_norm.weight", f"{LAYER}.self_attn.q_norm.weight"),
        ("gpt2", "transformer.h.3.ln_1.bias", "transformer.h.3.ln_1.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("gpt-oss", f"{LAYER}.self_attn.sinks", f"{LAYER}.self_attn.sinks"),
        ("lfm2-hybrid", "model.layers.0.conv.conv.weight", "model.layers.0.conv.conv.weight"),
        ("llava", "language_model.model.norm.weight", "model.language_model.norm.weight"),
    ],
)
def test_a_missing_weight_is_refused_by_name(layout: str, stored: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"does not load whole .*missing.*: .*{name}"):
        load(damage(tmp_path, drop(stored), layout))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename(lambda name: f"_orig_mod.{name}"), "'_orig_mod.'"),
        (rename(lambda name: f"module.{name}"), "'module.'"),
        (rename(lambda name: name.replace("model.", "model.language_model.", 1)), "model.language_model.embed_tokens"),
        (rename(lambda name: name.replace("q_proj", "wq")), "self_attn.wq.weight"),
        (rename(lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")), "q_proj.base_layer"),
        (add(**{f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}), "q_proj.lora_A"),
        (add(**{f"{LAYER}.self_attn.q_proj.bias": torch.ones(32)}), "q_proj.bias"),
        (add(**{"lm_head.bias": torch.ones(tiny.VOCAB)}), "lm_head.bias"),
        (add(**{"model.norm.bias": torch.ones(32)}), "model.norm.bias"),
        (add(**{QUERY: torch.ones(32, 16)}), QUERY),
        (add(**{"model.embed_tokens.weight": torch.ones(8, 32)}), "model.embed_tokens.weight"),
        (add(**{QUERY: torch.full((32, 32), float("nan"))}), QUERY),
        (add(**{"lm_head.weight": torch.full((tiny.VOCAB, 32), float("inf"))}), "lm_head.weight"),
    ],
)
def test_names_and_numbers_that_are_not_the_model_s_are_refused(
    change: Callable[[Weights], object], says: str, tmp_path: Path
) -> None:
    assert_refused(damage(tmp_path, change), says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: to_float8(weights, scale=".weight_scale"), "weight_scale"),
        (lambda weights: to_float8(weights, scale=".weight_scale_inv"), "weight_scale_inv"),
        (to_float8, "down_proj.weight"),
        (lambda weights: weights.update({DOWN: weights[DOWN].to(torch.float8_e5m2)}), DOWN),
        (lambda weights: weights.update({DOWN: (weights[DOWN] * 9).to(torch.int8)}), DOWN),
        (add(**{f"{LAYER}.mlp.down_proj.input_scale": torch.ones(())}), "down_proj.input_scale"),
        (add(**{f"{LAYER}.mlp.down_proj.SCB": torch.ones(32)}), "down_proj.SCB"),
        (as_packed(".qweight", ".qzeros", ".scales", ".g_idx"), "down_proj.qweight"),
        (as_packed(".qweight"), "down_proj.qweight"),
        (as_packed(".weight", ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4"), "down_proj.weight.absmax"),
        (as_packed(".weight_packed", ".weight_scale", ".weight_global_scale"), "down_proj.weight_packed"),
        (as_packed(".weight", ".weight_scale", ".weight_scale_2"), "down_proj.weight_scale_2"),
        (as_packed("_blocks", "_scales"), "down_proj_blocks"),
        (as_packed(".weight:qdata", ".weight:scale"), "down_proj.weight:qdata"),
    ],
)
def test_quantised_weights_without_their_config_are_refused(
    change: Callable[[Weights], object], says: str, tmp_path: Path
) -> None:
    assert_refused(damage(tmp_path, change), says)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, "modelopt_fp4"),
        ({"quant_method": "a form of tomorrow"}, "a form of tomorrow"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"bits": 8}, "quant_method"),
    ],
)
def test_a_quantisation_that_transformers_cannot_load_is_refused(
    method: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = damage(tmp_path, lambda weights: to_float8(weights, scale=".weight_scale"))
    set_config(tmp_path, quantization_config=method)

    with pytest.raises(AdapterError, match=says):
        load(path)


def test_modelopt_s_own_file_is_a_quantisation(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda weights: None)
    own = tmp_path / "hf_quant_config.json"

    own.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}))
    with pytest.raises(AdapterError, match=r"hf_quant_config.json: FP8"):
        load(path)

    own.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    load(path)


def test_block_scales_that_transformers_knows_load_and_a_lacking_one_is_refused(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda weights: to_float8(weights, scale=".weight_scale_inv"))
    set_config(tmp_path, quantization_config=FP8)
    load(path)

    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(f"{DOWN}_scale_inv")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=f"without a scale: {DOWN}"):
        load(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(f"{EXPERT}.up_proj.weight"), "experts.gate_up_proj"),
        (drop(*(f"{EXPERT}.{part}_proj.weight" for part in ("gate", "up", "down"))), "experts.down_proj"),
        (rename(lambda name: name.replace(EXPERT, "model.layers.1.mlp.experts.7")), "without a gap"),
        (lambda weights: weights.update({f"{EXPERT}.up_proj.weight_scale": torch.ones(1)}), "gate_up_proj"),
        (to_float8, "experts.0"),
    ],
)
def test_experts_that_are_not_all_there_are_refused(
    change: Callable[[Weights], object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError) as caught:
        load(damage(tmp_path, change, "qwen3-moe"))

    assert says in str(caught.value)


def test_layers_that_the_config_does_not_count_are_refused(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda weights: None)
    set_config(tmp_path, num_hidden_layers=tiny.LAYERS - 1)

    with pytest.raises(AdapterError, match=r"more decoder layers than config.json says: model.layers.4"):
        load(path)


@pytest.mark.parametrize("safe", [True, False])
def test_a_sharded_checkpoint_must_have_all_of_its_parts(safe: bool, tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    if not safe:
        for shard in tmp_path.glob("*.safetensors"):
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
        index["weight_map"] = {name: f"{shard[:-12]}.bin" for name, shard in index["weight_map"].items()}
        (tmp_path / "model.safetensors.index.json").unlink()
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    load(tmp_path)
    shard = tmp_path / index["weight_map"][DOWN]
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-64])
    with pytest.raises(AdapterError, match=shard.name):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(AdapterError, match=f"{shard.name} is not there"):
        load(tmp_path)
    save = save_file if safe else torch.save
    save({"model.norm.weight": torch.ones(32)}, shard)
    with pytest.raises(AdapterError, match=DOWN):
        load(tmp_path)


def test_a_single_old_file_must_be_whole_too(tmp_path: Path) -> None:
    damage(tmp_path, lambda weights: None)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load(tmp_path)

    torch.save({name: value for name, value in weights.items() if name != DOWN}, tmp_path / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=DOWN):
        load(tmp_path)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_changes_nothing(device_map: str, tmp_path: Path) -> None:
    path = damage(tmp_path, drop(DOWN))

    with pytest.raises(AdapterError, match=DOWN):
        HFAdapter.load(path, HFOptions(device_map=device_map))


def test_weights_left_on_the_meta_device_are_refused(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda weights: None)

    with pytest.raises(AdapterError, match=r"left without values: .*weight"):
        HFAdapter.load(path, HFOptions(device_map="meta"))


def test_a_peft_adapter_must_be_merged(tmp_path: Path) -> None:
    path = damage(tmp_path, lambda weights: None)
    (tmp_path / "adapter_config.json").write_text("{}")

    with pytest.raises(AdapterError, match=r"PEFT adapter .*merge_and_unload"):
        load(path)


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("llama", add(**{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(5)})),
        ("llama", add(**{f"{LAYER}.self_attn.k_scale": torch.ones(()), f"{LAYER}.self_attn.v_scale": torch.ones(())})),
        ("llama", add(**{"mtp.layers.0.mlp.down_proj.weight": torch.ones(2), "mtp.fc.weight": torch.ones(2)})),
        ("llama", add(**{"vision_tower.blocks.0.q_proj.weight": torch.ones(2), "score.weight": torch.ones(2)})),
        ("llama", add_prediction_layer),
        ("llama", lambda weights: weights.update({name: value.bfloat16() for name, value in weights.items()})),
        ("llama", rename(lambda name: name)),
        (
            "llama-tied",
            lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
        ),
        ("llama-tied", rename(lambda name: name.replace("model.embed_tokens", "lm_head"))),
        ("llama-tied", rename(lambda name: name.removeprefix("model."))),
        ("gpt2", add(**{"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.ones(())})),
        ("gpt-neox", add(**{"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)})),
        ("qwen3-moe", rename(lambda name: name)),
        ("gemma3-vision", rename(lambda name: name)),
    ],
)
def test_a_whole_checkpoint_loads_whatever_lies_beside_its_weights(
    layout: str, change: Callable[[Weights], object], tmp_path: Path
) -> None:
    runner = load(damage(tmp_path, change, layout), dtype="float32")
    runner.set_aux_layers((0, 2, 3))
    ids, lengths = tiny.random_request(5, 3)

    aux = runner.forward_eagle3(ids, lengths).aux_hidden_states

    expected, _, _ = tiny.oracle(tiny.build(layout), ids, lengths, (0, 2, 3))
    torch.testing.assert_close(aux, expected, atol=0.1, rtol=0.1)


def test_what_is_left_over_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = damage(tmp_path, add(**{"score.weight": torch.ones(2)}))

    with caplog.at_level(logging.INFO):
        load(path)

    assert [record.levelname for record in caplog.records if "score.weight" in record.getMessage()] == ["INFO"]


LOAD_FROM_CACHE = """
import sys, torch
from eagle_target.checkpoints.loading import check_checkpoint
from eagle_target_hf import HFAdapter, HFOptions
torch.set_num_threads(1)
print("checked", check_checkpoint("somebody/model"))
HFAdapter.load("somebody/model", HFOptions(device="cpu"))
print("loaded")
"""


@pytest.mark.parametrize(
    ("gone", "added", "says"),
    [
        (None, None, "checked True\nloaded"),
        # Half of a download: nothing is wrong with the checkpoint, and the loader fetches the rest.
        ("model-00002-of-", None, "checked False"),
        (None, "adapter_config.json", "has a PEFT adapter"),
    ],
    ids=["whole", "half fetched", "adapter"],
)
def test_a_hub_model_is_looked_at_once_it_is_here(
    gone: str | None, added: str | None, says: str, tmp_path: Path
) -> None:
    repository = tmp_path / "models--somebody--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    tiny.build("llama").save_pretrained(snapshot, max_shard_size="50KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in snapshot.iterdir():
        if gone is not None and path.name.startswith(gone):
            path.unlink()
    if added is not None:
        (snapshot / added).write_text("{}")

    result = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_CACHE],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert says in result.stdout + result.stderr
    assert (result.returncode == 0) == (gone is None and added is None)
