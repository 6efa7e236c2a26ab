"""Which weights a target has: told of the files and of a module, the same for copies and no other."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_target.checkpoints import digest
from eagle_target.checkpoints.digest import (
    checkpoint_digest,
    digest_after_loading,
    hub_commit,
    module_digest,
    sampled_blocks,
)
from eagle_target.errors import AdapterError
from eagle_target.testing.tiny import save_tiny_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny_target(tmp_path / "target", layers=2)


def digest_of(path: Path, **options: Any) -> str:
    digest = checkpoint_digest(str(path), **options)
    assert digest is not None
    return digest


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def split_into_shards(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shards = {}
    for index, name in enumerate(weights):
        shards[name] = f"model-{index % 2}.safetensors"
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in weights if shards[name] == shard}, path / shard)
    edit_json(path / "model.safetensors.index.json", weight_map=shards)


def test_a_copy_elsewhere_has_the_same(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert digest_of(tmp_path / "copy") == digest_of(checkpoint)


def test_shards_do_not_matter(checkpoint: Path) -> None:
    before = digest_of(checkpoint)
    split_into_shards(checkpoint)
    assert digest_of(checkpoint) == before


def test_one_element_of_any_tensor_matters(checkpoint: Path) -> None:
    seen = {digest_of(checkpoint)}
    names = list(load_file(checkpoint / "model.safetensors"))
    for name in names:

        def change(weights: dict[str, torch.Tensor], name: str = name) -> None:
            weights[name].flatten()[weights[name].numel() // 2] += 1

        rewrite(checkpoint, change)
        seen.add(digest_of(checkpoint))
    assert len(seen) == len(names) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("lm_head.weight"),
        lambda weights: weights.update(extra=torch.ones(1)),
        lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].double()}),
        lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"][None]}),
    ],
    ids=["missing", "extra", "dtype", "shape"],
)
def test_names_dtypes_and_shapes_matter(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    before = digest_of(checkpoint)
    rewrite(checkpoint, change)
    assert digest_of(checkpoint) != before


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_what_a_config_says_matters(checkpoint: Path, name: str) -> None:
    before = digest_of(checkpoint)
    edit_json(checkpoint / name, rope_theta=123.0)
    assert digest_of(checkpoint) != before


def test_code_of_the_checkpoint_matters(checkpoint: Path) -> None:
    before = digest_of(checkpoint)
    (checkpoint / "modeling_x.py").write_text("pass\n")
    assert digest_of(checkpoint) != before


def test_options_that_decide_the_values_matter(checkpoint: Path) -> None:
    assert digest_of(checkpoint, options={"quantization": None}) == digest_of(checkpoint)
    assert digest_of(checkpoint, options={"quantization": "fp8"}) != digest_of(checkpoint)


def test_who_wrote_the_config_does_not_matter(checkpoint: Path) -> None:
    before = digest_of(checkpoint)
    edit_json(checkpoint / "config.json", transformers_version="4.0", _name_or_path="elsewhere")
    (checkpoint / "README.md").write_text("a card\n")
    assert digest_of(checkpoint) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "other.pth", "model.gguf", "adapter_model.bin"])
def test_other_formats_are_read_as_files(checkpoint: Path, name: str) -> None:
    if name != "adapter_model.bin":
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(bytes(1000))
    before = digest_of(checkpoint)
    (checkpoint / name).write_bytes(bytes(999) + b"x")
    assert digest_of(checkpoint) != before


def test_a_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"one")
    before = digest_of(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"two")
    assert digest_of(tmp_path / "a.gguf") != before


def test_a_second_copy_of_the_weights_does_not_matter(checkpoint: Path) -> None:
    split_into_shards(checkpoint)
    before = digest_of(checkpoint)
    (checkpoint / "consolidated.safetensors").write_bytes(b"not looked at")
    (checkpoint / "pytorch_model.bin").write_bytes(b"neither")
    assert digest_of(checkpoint) == before


def test_large_checkpoints_are_sampled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WHOLE_BYTES", 0)
    monkeypatch.setattr(digest, "WHOLE_TENSOR_BYTES", 4096)
    monkeypatch.setattr(digest, "BLOCKS", 0)
    seen = {digest_of(checkpoint)}
    ends = {"model.norm.weight": 5, "lm_head.weight": 0, "model.embed_tokens.weight": -1}
    for name, position in ends.items():

        def change(weights: dict[str, torch.Tensor], name: str = name, position: int = position) -> None:
            weights[name].view(-1)[position] += 1

        rewrite(checkpoint, change)
        seen.add(digest_of(checkpoint))
    assert len(seen) == len(ends) + 1

    def change_the_middle(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"].view(-1)[weights["lm_head.weight"].numel() // 2] += 1

    rewrite(checkpoint, change_the_middle)
    assert digest_of(checkpoint) in seen, "with two blocks a tensor the middle is not looked at"


def test_blocks_are_spread_over_a_tensor_and_bounded_in_all() -> None:
    tensors = [235 << 20] * 2000
    starts = [sampled_blocks(nbytes, sum(tensors)) for nbytes in tensors]
    assert all(each is not None and each[0] == 0 and each[-1] == (235 << 20) - 4096 for each in starts)
    assert all(each == sorted(set(each)) for each in starts if each is not None)
    assert sum(len(each or []) for each in starts) <= digest.BLOCKS
    assert sampled_blocks(235 << 20, 1 << 29) is None
    assert sampled_blocks(8192, 1 << 40) is None


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_that_was_cut_off_is_refused_by_name(checkpoint: Path, cut: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        AdapterError, match=rf"{path} has \d+ bytes, its header says \d+ .*not downloaded or copied whole"
    ):
        digest_of(checkpoint)


@pytest.mark.parametrize("content", [b"", b"12345678", (40).to_bytes(8, "little") + b"x" * 40])
def test_what_is_no_safetensors_file_is_refused_by_name(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=r"could not load .*model\.safetensors, "):
        digest_of(checkpoint)


def test_a_missing_shard_is_refused_by_name(checkpoint: Path) -> None:
    split_into_shards(checkpoint)
    (checkpoint / "model-1.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"model-1\.safetensors is not there"):
        digest_of(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused_by_name(checkpoint: Path, text: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AdapterError, match="is no index of a checkpoint"):
        digest_of(checkpoint)


def test_what_is_not_on_this_machine_is_not_known() -> None:
    assert checkpoint_digest("nobody/has-this") is None
    assert checkpoint_digest("no path and no hub id") is None
    assert hub_commit("nobody/has-this", "main") == "main"


def test_a_hub_id_is_what_its_commit_in_the_cache_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        save_tiny_target(repository / "snapshots" / commit, layers=2, seed=seed)
    (repository / "refs" / "main").write_text("a" * 40)
    first = checkpoint_digest("some/model")
    assert hub_commit("some/model") == "a" * 40
    (repository / "refs" / "main").write_text("b" * 40)
    assert hub_commit("some/model") == hub_commit("some/model", "main") == "b" * 40
    assert hub_commit("some/model", "a" * 40) == "a" * 40
    assert first == digest_of(checkpoint) != checkpoint_digest("some/model")
    assert checkpoint_digest("some/model", revision="a" * 40) == first
    assert hub_commit(str(checkpoint)) is None


def module(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))


def test_a_module_is_what_is_in_its_memory() -> None:
    assert module_digest(module()) == module_digest(module())
    assert module_digest(module()) != module_digest(module(1))
    changed = module()
    changed.get_buffer("1.running_mean")[-1] = 1
    assert module_digest(changed) != module_digest(module())
    assert module_digest(module().double()) != module_digest(module())


def test_a_large_module_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WHOLE_BYTES", 0)
    monkeypatch.setattr(digest, "WHOLE_TENSOR_BYTES", 4096)
    monkeypatch.setattr(digest, "BLOCKS", 0)
    changed = module()
    with torch.no_grad():
        changed.get_parameter("0.weight")[-1, -1] += 1
    assert module_digest(changed) != module_digest(module()) == module_digest(module())


def test_what_has_no_memory_counts_with_its_shape() -> None:
    assert module_digest(module().to("meta")) == module_digest(module(1).to("meta"))
    assert module_digest(module().to("meta")) != module_digest(module())


@pytest.mark.parametrize("missing", [["model.safetensors"], ["model-1.safetensors"]])
def test_a_hub_s_files_that_are_still_to_be_fetched_are_not_known(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / ("a" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    if missing == ["model-1.safetensors"]:
        split_into_shards(checkpoint)
    shutil.copytree(checkpoint, snapshot)
    whole = checkpoint_digest("some/model")
    for name in missing:
        (snapshot / name).unlink()
    before = checkpoint_digest("some/model")
    shutil.copytree(checkpoint, snapshot, dirs_exist_ok=True)

    assert before is None
    assert digest_after_loading(before, "some/model") == whole
