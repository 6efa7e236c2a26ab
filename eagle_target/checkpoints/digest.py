"""Which weights a target has, told in seconds: a digest of their names, sizes and samples of their contents.

Of a checkpoint on disk, or of a module in memory. The order of shards and the name of the folder do not matter.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from eagle_target.checkpoints.files import find_folder, read_index
from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# A checkpoint of up to so many bytes is read whole.
WHOLE_BYTES = 1 << 30
# Of a larger one, tensors of up to so many bytes are: norms, biases, scales.
WHOLE_TENSOR_BYTES = 16 << 10
BLOCK_BYTES = 4 << 10
# Blocks that are read of all tensors together, and the fewest of one: what a disk gives in seconds.
BLOCKS = 1 << 16
MIN_TENSOR_BLOCKS = 2
READERS = 8
READ_BYTES = 1 << 20
MAX_HEADER_BYTES = 100 << 20

# Each format's file and index, and whatever else may hold weights, in the order in which engines look for them.
FORMATS = (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "*.bin", "*.pt", "*.pth"), ("*.gguf",))
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Mistral's own copy of what the other files hold.
SECOND_COPIES = "consolidated"
CONFIG = "config.json"
# Small files that decide the values: a quantisation beside the config, and a checkpoint's own code.
SETTINGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "*.py")
# What a config says of its writer.
NO_FACTS = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class Weights:
    """One run of bytes: a tensor of a safetensors file, or a whole file of another format."""

    name: str
    kind: str
    path: Path
    start: int
    nbytes: int


def checkpoint_digest(
    model: str, *, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> str | None:
    """XXH3 (128 bits, hexadecimal) of a checkpoint's names, dtypes, shapes, config and contents.

    Up to `WHOLE_BYTES` everything is read, of more than that small tensors and blocks of the large ones, evenly
    spread, the first and the last among them.

    Args:
        model: a folder, a file, or a hub id whose files are in the local cache. revision: of a hub id.
        options: what else decides the values, as the engine was told it; None among them counts as not said.

    Returns:
        None where the files are not on this machine's disk, or not all of a hub's are.

    Raises:
        AdapterError: a file is missing or shorter than it says, or is no checkpoint's.
    """
    place = Path(model) if Path(model).is_file() else find_folder(model, revision)
    if place is None:
        return None
    files = _weight_files(place)
    if not Path(model).exists() and not (files and all(path.exists() for path in files)):
        # A hub's files that are still to be fetched.
        return None
    try:
        parts = [part for path in files for part in _weights_of(path)]
        parts.sort(key=lambda part: part.name)
        total = sum(part.nbytes for part in parts)
        state = xxhash.xxh3_128(json.dumps(_settings(place, options or {}), sort_keys=True).encode())
        with ThreadPoolExecutor(READERS) as readers:
            samples = readers.map(lambda part: _read_samples(part, total), parts)
            for part, sample in zip(parts, samples, strict=True):
                state.update(f"{part.name} {part.kind} {part.nbytes} {sample}\n".encode())
    except FileNotFoundError as error:
        raise AdapterError(
            f"{error.filename} is not there, though the checkpoint's index names it: copy it again"
        ) from error
    except OSError as error:
        raise AdapterError(f"could not load {place}: {error}") from error
    return state.hexdigest()


def digest_after_loading(
    before: str | None, model: str, *, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> str | None:
    """The digest once more, right after an engine read the files.

    Args:
        before: `checkpoint_digest` from just before. Files of a hub are not compared with it: they may have been
            fetched meanwhile, and a commit's do not change.

    Raises:
        AdapterError: it is another, so nobody knows which bytes the engine read.
    """
    after = checkpoint_digest(model, revision=revision, options=options)
    if Path(model).exists() and after != before:
        raise AdapterError(f"the files of {model!r} changed while they were loaded: load it again once they are whole")
    return after


def module_digest(module: torch.nn.Module) -> str:
    """The same of a module's parameters and buffers, where they are; other bytes than `checkpoint_digest`.

    A tensor without plain memory of its own, an offloaded one say, counts with its name, dtype and shape.
    """
    # Not its state_dict, which sharded and quantised modules assemble by hooks.
    tensors = sorted([*module.named_parameters(), *module.named_buffers()], key=lambda item: item[0])
    total = sum(tensor.nbytes for _, tensor in tensors)
    state = xxhash.xxh3_128()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if _has_plain_memory(tensor):
            state.update(_tensor_samples(tensor, total))
    return state.hexdigest()


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """The commit of a hub id's files in the local cache; `revision` where that cannot be told."""
    place = None if Path(model).exists() else find_folder(model, revision)
    return place.name if place is not None and place.parent.name == "snapshots" else revision


def sampled_blocks(nbytes: int, total: int) -> list[int] | None:
    """Where the blocks begin that are read of a tensor of so many bytes; None where it is read whole.

    Args:
        total: bytes of the whole checkpoint, of which this tensor has its share of `BLOCKS`.
    """
    if total <= WHOLE_BYTES or nbytes <= WHOLE_TENSOR_BYTES:
        return None
    blocks = max(BLOCKS * nbytes // total, MIN_TENSOR_BLOCKS)
    return [(nbytes - BLOCK_BYTES) // (blocks - 1) * index for index in range(blocks - 1)] + [nbytes - BLOCK_BYTES]


def _weight_files(place: Path) -> list[Path]:
    """All files that an engine may take the weights from; `read_stored` has those that transformers does."""
    if place.is_file():
        return [place]
    found = _main_files(place)
    found += [place / name for name in ADAPTER_FILES if (place / name).is_file()]
    return sorted(set(found))


def _main_files(folder: Path) -> list[Path]:
    """A format's own file and those of its index, where there are both, for engines differ in which they take."""
    for first, *patterns in FORMATS:
        found = list(folder.glob(first))
        index = folder / f"{first}.index.json"
        if index.is_file():
            found += read_index(index)
        if not found:
            others = [path for pattern in patterns for path in folder.glob(pattern) if path.name not in ADAPTER_FILES]
            found = [path for path in others if not path.name.startswith(SECOND_COPIES)] or others
        if found:
            return found
    return []


def _settings(place: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"options": {name: str(value) for name, value in options.items() if value is not None}}
    if place.is_dir():
        for path in sorted(path for pattern in SETTINGS for path in place.glob(pattern)):
            settings[path.name] = xxhash.xxh3_128_hexdigest(path.read_bytes())
        if (place / CONFIG).is_file():
            settings[CONFIG] = _read_config(place / CONFIG)
    return settings


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path} is no config of a checkpoint: {error}") from error
    return {name: value for name, value in config.items() if name not in NO_FACTS}


def _weights_of(path: Path) -> Iterator[Weights]:
    try:
        size = path.stat().st_size
        if path.suffix != ".safetensors":
            yield Weights(path.name, path.suffix, path, 0, size)
            return
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size):
                raise AdapterError(f"could not load {path}, it does not start like a safetensors file: copy it again")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise AdapterError(
                    f"{path} has {size} bytes, its header says {8 + length + end} for {name!r}: it was not downloaded "
                    "or copied whole"
                )
            yield Weights(name, f"{entry['dtype']} {entry['shape']}", path, 8 + length + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"could not load {path}, copy it again: {type(error).__name__}: {error}") from error


def _read_samples(part: Weights, total: int) -> str:
    state = xxhash.xxh3_128()
    starts = sampled_blocks(part.nbytes, total)
    size = BLOCK_BYTES
    if starts is None:
        starts, size = list(range(0, part.nbytes, READ_BYTES)), READ_BYTES
    with part.path.open("rb", buffering=0) as file:
        for start in starts:
            state.update(os.pread(file.fileno(), min(size, part.nbytes - start), part.start + start))
    return state.hexdigest()


def _has_plain_memory(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta


def _tensor_samples(tensor: torch.Tensor, total: int) -> memoryview:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    starts = sampled_blocks(len(flat), total)
    if starts is not None:
        # One gather of all blocks but the last: on a device each copy by itself would wait for it.
        step = starts[1] - starts[0]
        flat = torch.cat([flat.as_strided((len(starts) - 1, BLOCK_BYTES), (step, 1)).flatten(), flat[starts[-1] :]])
    return flat.cpu().numpy().data
