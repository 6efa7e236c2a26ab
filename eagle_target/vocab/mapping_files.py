"""Vocabulary mappings in files: our own, and those that EAGLE and SpecForge tooling reads and writes.

vocab = the target's vocabulary; draft_vocab = the draft's.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from eagle_target.errors import VocabMappingError

if TYPE_CHECKING:
    from pathlib import Path

WANTED = "selected_token_ids and selected_token_mask, or d2t and t2d"
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


class MappingTensors(NamedTuple):
    """What a file has of a mapping: its tensors by key, the names of all tensors in it, the hash it says it has."""

    tensors: dict[str, torch.Tensor]
    names: list[str]
    sha256: str | None


def read_mapping_tensors(path: Path) -> MappingTensors:
    """Read a mapping's tensors from a `.safetensors`, `.pt`, `.bin` or `.pth` file, on the CPU.

    The file may be a whole draft checkpoint, whose other weights are not read.

    Raises:
        VocabMappingError: the file cannot be read, or is unsafe.
    """
    _check_suffix(path)
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "does not exist"
        raise VocabMappingError(f"{path} {what}; a mapping is a {', '.join(SUFFIXES)} file")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def write_mapping_tensors(tensors: dict[str, torch.Tensor], path: Path, sha256: str) -> None:
    """Write a mapping's tensors; a failure leaves no half-written file. The same tensors give the same `.safetensors`.

    Raises:
        VocabMappingError: the file cannot be written.
    """
    check_output_path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".safetensors":
            # Not save_file: it makes files that only their owner can read.
            part.write_bytes(to_safetensors(tensors, {SHA256_KEY: sha256}))
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


def _read_safetensors(path: Path) -> MappingTensors:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in KEYS if key in names}
            return MappingTensors(tensors, names, metadata.get(SHA256_KEY))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise VocabMappingError(f"{path} cannot be read as safetensors: {error}") from error


def _read_torch(path: Path) -> MappingTensors:
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
        raise VocabMappingError(f"{path} has a {type(content).__name__}, not a dict of tensors: expected {WANTED}")
    tensors = {key: content[key].clone() for key in KEYS if isinstance(content.get(key), torch.Tensor)}
    return MappingTensors(tensors, [str(name) for name in content], None)
