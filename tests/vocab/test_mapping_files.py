"""Mappings survive their files, and files that are no mappings are refused with a reason."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import VocabMappingError
from eagle_target.vocab.mapping_files import SHA256_KEY

if TYPE_CHECKING:
    from pathlib import Path

IDS = [7, 2, 5, 0]
VOCAB = 10
SUFFIXES = [".safetensors", ".pt", ".bin", ".pth"]


@pytest.fixture
def mapping() -> VocabMapping:
    return VocabMapping.from_ids(torch.tensor(IDS), VOCAB)


def write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_keeps_an_order_that_is_not_ascending(mapping: VocabMapping, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mapping{suffix}"
    mapping.save(path)
    loaded = VocabMapping.from_file(path)
    assert loaded == mapping
    assert loaded.selected_token_ids.tolist() == IDS
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_has_what_eagle_and_specforge_read(mapping: VocabMapping, tmp_path: Path) -> None:
    mapping.save(tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert (tensors["d2t"] + torch.arange(4)).tolist() == IDS
    assert tensors["t2d"].nonzero().flatten().tolist() == sorted(IDS)
    assert tensors["d2t"].dtype == torch.int64
    assert tensors["t2d"].dtype == torch.bool


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_saved_file_has_the_rights_of_any_new_file(mapping: VocabMapping, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "any").touch()
    mapping.save(tmp_path / f"m{suffix}")
    assert (tmp_path / f"m{suffix}").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_the_same_mapping_gives_the_same_bytes(mapping: VocabMapping, tmp_path: Path) -> None:
    for name in ("a", "b"):
        mapping.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_draft_checkpoint_is_a_mapping(mapping: VocabMapping, tmp_path: Path, suffix: str) -> None:
    weights = {"fc.weight": torch.ones(4, 4), "d2t": mapping.d2t, "t2d": mapping.t2d}
    assert VocabMapping.from_file(write(weights, tmp_path / f"draft{suffix}")) == mapping


def test_other_integer_dtypes_are_read(mapping: VocabMapping, tmp_path: Path) -> None:
    tensors = {"d2t": mapping.d2t.to(torch.int32), "t2d": mapping.t2d.to(torch.uint8)}
    assert VocabMapping.from_file(write(tensors, tmp_path / "m.safetensors")) == mapping


@pytest.mark.parametrize("key", ["selected_token_ids", "d2t"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_ids_alone_need_the_vocabulary_size(mapping: VocabMapping, tmp_path: Path, key: str, suffix: str) -> None:
    path = write({key: getattr(mapping, key)}, tmp_path / f"ids{suffix}")
    with pytest.raises(VocabMappingError, match=f"{path}.*has {key} but no .*: pass vocab_size"):
        VocabMapping.from_file(path)
    assert VocabMapping.from_file(path, vocab_size=VOCAB) == mapping


def test_a_mapping_for_another_vocabulary_is_refused(mapping: VocabMapping, tmp_path: Path) -> None:
    mapping.save(tmp_path / "m.safetensors")
    with pytest.raises(VocabMappingError, match=r"m\.safetensors: the mapping is for a vocabulary of 10.*has 12"):
        VocabMapping.from_file(tmp_path / "m.safetensors", vocab_size=12)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_keys_name_what_is_there(tmp_path: Path, suffix: str) -> None:
    tensors = {f"layers.{i}.weight": torch.ones(1) for i in range(12)}
    path = write(tensors, tmp_path / f"m{suffix}")
    with pytest.raises(VocabMappingError, match=rf"{path}: it has layers\.0\.weight, .* and 4 more: expected selected"):
        VocabMapping.from_file(path)


def test_two_different_mappings_in_one_file_are_refused(mapping: VocabMapping, tmp_path: Path) -> None:
    other = VocabMapping.identity(VOCAB)
    tensors = {"selected_token_ids": mapping.selected_token_ids, "d2t": other.d2t, "t2d": other.t2d}
    with pytest.raises(VocabMappingError, match="disagrees"):
        VocabMapping.from_file(write(tensors, tmp_path / "m.safetensors"))
    tensors |= {"selected_token_mask": mapping.selected_token_mask}
    with pytest.raises(VocabMappingError, match="two different mappings"):
        VocabMapping.from_file(write(tensors, tmp_path / "m.safetensors"))


def test_a_file_changed_after_it_was_written_is_refused(mapping: VocabMapping, tmp_path: Path) -> None:
    tensors = {"d2t": mapping.d2t, "t2d": mapping.t2d}
    path = write(tensors, tmp_path / "m.safetensors", {SHA256_KEY: "0" * 64})
    with pytest.raises(VocabMappingError, match="it was changed"):
        VocabMapping.from_file(path)


def test_offsets_cast_to_floats_are_refused(mapping: VocabMapping, tmp_path: Path) -> None:
    tensors = {"d2t": mapping.d2t.to(torch.bfloat16), "t2d": mapping.t2d}
    with pytest.raises(VocabMappingError, match=r"d2t must be a vector of integers, got torch\.bfloat16"):
        VocabMapping.from_file(write(tensors, tmp_path / "m.safetensors"))


def test_invalid_ids_name_the_file(tmp_path: Path) -> None:
    path = write({"selected_token_ids": torch.tensor([1, 1])}, tmp_path / "m.pt")
    with pytest.raises(VocabMappingError, match=rf"{path}: selected_token_ids has 1 more than once"):
        VocabMapping.from_file(path, vocab_size=4)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"selected_token_ids": Malicious(tmp_path / "owned")}, tmp_path / "m.pt")
    with pytest.raises(VocabMappingError, match=r"m\.pt .*could run code: it was not loaded.*safetensors"):
        VocabMapping.from_file(tmp_path / "m.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_files_are_refused(mapping: VocabMapping, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    mapping.save(path)
    content, rng = path.read_bytes(), random.Random(0)
    damaged = [b"", b"hello", content[: len(content) // 2], *(rng.randbytes(200) for _ in range(200))]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(VocabMappingError, match=str(path)):
            VocabMapping.from_file(path)


def test_a_file_with_no_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torch.arange(3), tmp_path / "m.pt")
    with pytest.raises(VocabMappingError, match="has a Tensor, not a dict of tensors"):
        VocabMapping.from_file(tmp_path / "m.pt")


def test_paths_that_are_no_mapping_files_are_refused(mapping: VocabMapping, tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    for name, reason in [("m.npy", "suffix '.npy'"), ("none.pt", "does not exist"), ("folder.pt", "is a folder")]:
        with pytest.raises(VocabMappingError, match=reason):
            VocabMapping.from_file(tmp_path / name)
    for name, reason in [("m.npy", "suffix"), ("nowhere/m.pt", "no folder"), ("folder.pt", "is a folder")]:
        with pytest.raises(VocabMappingError, match=reason):
            mapping.save(tmp_path / name)


def test_a_failed_save_leaves_the_old_file(
    mapping: VocabMapping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    mapping.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(VocabMappingError, match="No space left"):
        VocabMapping.identity(4).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
