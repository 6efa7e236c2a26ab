"""What the files of a checkpoint hold, told by their headers: names, dtypes and shapes, no values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_NAMES_SHOWN = 4
# In the order in which transformers looks for them.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What quantisation puts beside a weight, or in its place; the last part of a name.
_SCALE_LIKE = re.compile(
    r"(^|[._:])(scales?|scale_inv|(weight|input|output|activation|global|block)_scale\w*|qscale\w*|q?zeros|zero_point"
    r"|\w+_zero_point|qweight|g_idx|\w+_packed|weight_shape|(nested_)?absmax|(nested_)?quant_map|quant_state\w*"
    r"|bitsandbytes__\w+|SCB|CB|weight_format|\w+_blocks|\w+_scales?|\w+_scale_inv|codes|codebooks|W_q|_?amax|qdata)$"
)
# Scales of the KV cache: they say how keys and values may be stored, not what the weights are.
_CACHE_SCALE = re.compile(r"(attn|attention)(\.[kv]_proj)?\.[kv]{1,2}_scale$")
_ACTIVATION_SCALE = re.compile(r"(^|[._])(input|activation|act|output)_(global_)?scale$")
_FLOAT8 = re.compile(r"F8_E[45]M[23]")
# Names of dtypes in safetensors, and in torch.
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "I64")
# A part of a quantised weight, and endings of which one must stand beside it.
_PACKED = {
    "_blocks": ("_scales",),
    "_packed": ("_scale", "_global_scale"),
    "qweight": ("scales",),
}
_SCALES = ("_scale_inv", "_scale", "_scales", ".scale", ".scales", ":scale", ".weight_scale", ".weight_scale_inv")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint; dtype as safetensors names it, e.g. `F8_E4M3`."""

    dtype: str
    shape: tuple[int, ...]


def find_folder(name: str, revision: str | None) -> Path | None:
    """Where the files of a path or a hub id lie on this machine; None if they are not here."""
    path = Path(name)
    if path.exists():
        return path if path.is_dir() else None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def read_index(index: Path) -> list[Path]:
    """The files that an index of weights names, there or not, each once, in the order of their names.

    Raises:
        AdapterError: it is no index.
    """
    try:
        shards = json.loads(index.read_bytes())["weight_map"].values()
        return [index.parent / str(shard) for shard in sorted(set(shards))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{index} is no index of a checkpoint, copy it again: {type(error).__name__}: {error}"
        ) from error


def read_stored(folder: Path, file_name: str | None = None) -> dict[str, StoredTensor]:
    """Names, dtypes and shapes of the weights in a folder, as transformers would choose its files; empty if none.

    Args:
        folder: where the checkpoint lies.
        file_name: of the weights or of their index, where config.json names one.

    Raises:
        AdapterError: a file that the index names is not there, or one is cut short, or the index is none.
    """
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder, file_name):
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        try:
            stored.update(read(path))
        except FileNotFoundError as error:
            raise AdapterError(f"{path} is not there, though the checkpoint's index names it: copy it again") from error
        except Exception as error:
            raise AdapterError(f"could not load {path}, copy it again: {type(error).__name__}: {error}") from error
    return stored


def has_all_files(folder: Path, file_name: str | None = None) -> bool:
    """Whether there are weights, and every file of them is there; arguments as for `read_stored`."""
    files = _weight_files(folder, file_name)
    return bool(files) and all(path.exists() for path in files)


def faults_of_files(stored: Mapping[str, StoredTensor], *, names: Collection[str], is_quantised: bool) -> list[str]:
    """What cannot be right, whatever loads it.

    Args:
        stored: what the files hold.
        names: of the model's own weights that hold floating point numbers.
        is_quantised: whether the loader knows how the weights are quantised.
    """
    faults = []
    bare = sorted(_without_scale(stored))
    if not is_quantised:
        raw = [name for name, tensor in stored.items() if _FLOAT8.match(tensor.dtype) and not is_scale_like(name)]
        raw += [name for name, tensor in stored.items() if name in names and tensor.dtype in _INTEGERS]
        bare = sorted({*bare, *raw})
    if bare:
        faults.append(
            f"quantised numbers would be taken for the weights, without a scale: {list_names(bare)}. Use the "
            "checkpoint as it was published, with its scales and the quantization_config of its config.json"
        )
    gaps = sorted(_gaps_of_experts(stored))
    if gaps:
        faults.append(f"experts are not numbered from 0 on without a gap: {list_names(gaps)}")
    return faults


def is_scale_like(name: str) -> bool:
    """Whether a name is one that quantised weights have beside them, or in their place."""
    return _SCALE_LIKE.search(name) is not None


def is_needless_scale(name: str, *, is_quantised: bool) -> bool:
    """Whether a scale does not change the weights: of the KV cache, or of activations once the weights' were used."""
    return bool(_CACHE_SCALE.search(name) or (is_quantised and _ACTIVATION_SCALE.search(name)))


def list_names(names: Sequence[str]) -> str:
    """A few of the names, and how many there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _weight_files(folder: Path, file_name: str | None) -> list[Path]:
    names = _FILES if file_name is None else (file_name,)
    for path in (folder / name for name in names):
        if path.exists():
            return read_index(path) if path.suffix == ".json" else [path]
    return []


def _read_safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            tensor = file.get_slice(name)
            yield name, StoredTensor(tensor.get_dtype(), tuple(tensor.get_shape()))


def _read_pickle(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    import torch

    names = {getattr(torch, dtype, None): name for name, dtype in TORCH_DTYPES.items()}
    for name, tensor in torch.load(path, map_location="meta", weights_only=True).items():
        if isinstance(tensor, torch.Tensor):
            yield name, StoredTensor(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def _without_scale(stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Weights in 8 or fewer bits that have no scale beside them."""
    for name, tensor in stored.items():
        if _FLOAT8.match(tensor.dtype) and not is_scale_like(name):
            stems = (name, name.removesuffix(".weight"))
            if not any(stem + ending in stored for stem in stems for ending in _SCALES):
                yield name
        for packed, scales in _PACKED.items():
            if name.endswith(packed) and not any(name.removesuffix(packed) + scale in stored for scale in scales):
                yield name


def _gaps_of_experts(stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    numbers: dict[str, set[int]] = {}
    for name in stored:
        match = _EXPERT.match(name)
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    for list_name, found in numbers.items():
        if found != set(range(len(found))):
            yield f"{list_name}{min(set(range(len(found))) - found)}"
