"""Vocabulary mappings in files: our own, and those that EAGLE and SpecForge tooling reads and writes.

vocab = the target's vocabulary; draft_vocab = the draft's.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import VocabMappingError

if TYPE_CHECKING:
    from collections.abc import Iterable

KEYS = ("selected_token_ids", "selected_token_mask", "d2t", "t2d")
# One entry only: safetensors writes several in an order that changes from run to run.
SHA256_KEY = "vocab_mapping_sha256"
TORCH_SUFFIXES = (".pt", ".bin", ".pth")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# What torch.load raises on bytes that are no checkpoint; UnpicklingError also on one that wants to run code.
_TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_vocab_mapping(path: str | Path, *, vocab_size: int | None = None) -> VocabMapping:
    """Read a mapping from a `.safetensors`, `.pt`, `.bin` or `.pth` file, on the CPU.

    The file has `selected_token_ids` `[draft_vocab]` and `selected_token_mask` `[vocab]`, or the offsets `d2t`
    and the mask `t2d`; it may be a whole draft checkpoint, whose other weights are not read.

    Args:
        path: the file.
        vocab_size: size of the target's vocabulary; needed where the file has no mask, checked where it has one.

    Raises:
        VocabMappingError: the file cannot be read, is unsafe, or does not have a valid mapping.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "does not exist"
        raise VocabMappingError(f"{path} {what}; a mapping is a {', '.join(SUFFIXES)} file")
    tensors, names, sha256 = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    try:
        mapping = _assemble(tensors, names, vocab_size)
        _check_sha256(mapping, sha256)
        if vocab_size is not None:
            mapping.check_target(vocab_size)
    except VocabMappingError as error:
        raise VocabMappingError(f"{path}: {error}") from error
    return mapping


def save_vocab_mapping(mapping: VocabMapping, path: str | Path) -> None:
    """Write a mapping in both forms, ids with mask and `d2t` with `t2d`; a failure leaves no half-written file.

    The same mapping gives the same `.safetensors` bytes.

    Raises:
        VocabMappingError: the file cannot be written.
    """
    path = Path(path)
    check_output_path(path)
    mapping = mapping.to("cpu")
    tensors = {
        "selected_token_ids": mapping.selected_token_ids.contiguous(),
        "selected_token_mask": mapping.selected_token_mask.contiguous(),
        "d2t": mapping.d2t,
        "t2d": mapping.t2d.clone(),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".safetensors":
            # Not save_file: it makes files that only their owner can read.
            part.write_bytes(to_safetensors(tensors, {SHA256_KEY: mapping.sha256}))
        else:
            torch.save(tensors, part)
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise VocabMappingError(f"cannot write {path}: {error}") from error


def check_output_path(path: Path) -> None:
    """Refuse a path that no mapping can be written to, before the work of making one.

    Raises:
        VocabMappingError: another suffix, a folder, or in a folder that does not exist.
    """
    _check_suffix(path)
    if path.is_dir():
        raise VocabMappingError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise VocabMappingError(f"cannot write {path}: there is no folder {path.parent}; make it first")


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise VocabMappingError(f"{path} has the suffix {path.suffix!r}: a mapping is a {', '.join(SUFFIXES)} file")


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], list[str], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in KEYS if key in names}, names, metadata.get(SHA256_KEY)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise VocabMappingError(f"{path} cannot be read as safetensors: {error}") from error


def _read_torch(path: Path) -> tuple[dict[str, torch.Tensor], list[str], None]:
    try:
        # Memory-mapped, so that the weights of a draft checkpoint stay on disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise VocabMappingError(
            f"{path} is damaged or has more than tensors in it, and loading that could run code: it was not loaded. "
            "Save the tensors alone, best as .safetensors, with the tool that wrote it"
        ) from error
    except _TORCH_LOAD_ERRORS as error:
        raise VocabMappingError(f"{path} cannot be read by torch.load: {error}") from error
    if not isinstance(content, dict):
        raise VocabMappingError(f"{path} has a {type(content).__name__}, not a dict of tensors: expected {_wanted()}")
    tensors = {key: content[key].clone() for key in KEYS if isinstance(content.get(key), torch.Tensor)}
    return tensors, [str(name) for name in content], None


def _assemble(tensors: dict[str, torch.Tensor], names: Iterable[str], vocab_size: int | None) -> VocabMapping:
    mappings = []
    any_mask = tensors.get("selected_token_mask", tensors.get("t2d"))
    for ids_key, mask_key in (("selected_token_ids", "selected_token_mask"), ("d2t", "t2d")):
        if ids_key not in tensors:
            continue
        ids, mask = _integers(ids_key, tensors[ids_key]), tensors.get(mask_key, any_mask)
        if ids_key == "d2t":
            ids = ids + torch.arange(len(ids))
        if mask is not None:
            mappings.append(VocabMapping(ids, mask.to(torch.bool)))
        elif vocab_size is not None:
            mappings.append(VocabMapping.from_ids(ids, vocab_size))
        else:
            raise VocabMappingError(
                f"it has {ids_key} but no {mask_key}, so the size of the target's vocabulary is not known: "
                "pass vocab_size (the target's config.json has it)"
            )
    if not mappings:
        raise VocabMappingError(f"it has {_abridged(names)}: expected {_wanted()}")
    if len(set(mappings)) > 1:
        raise VocabMappingError("its selected_token_ids and its d2t are two different mappings: remove one of them")
    return mappings[0]


def _check_sha256(mapping: VocabMapping, sha256: str | None) -> None:
    if sha256 and sha256 != mapping.sha256:
        raise VocabMappingError(
            f"its content has sha256 {mapping.sha256}, its metadata says {sha256}: it was changed; build it again"
        )


def _integers(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise VocabMappingError(
            f"{key} must be a vector of integers, got {tensor.dtype} {list(tensor.shape)}: save it as int64"
        )
    return tensor.to(torch.int64)


def _abridged(names: Iterable[str], limit: int = 8) -> str:
    known = sorted(names)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + more if known else "nothing"


def _wanted() -> str:
    return "selected_token_ids and selected_token_mask, or d2t and t2d"
