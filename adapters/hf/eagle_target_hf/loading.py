"""From a path or a hub id to a loaded transformers model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from eagle_target.devices import resolve_device
from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from eagle_target_hf.options import HFOptions

_AUTO_CLASSES = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


def load_model(model: str, options: HFOptions) -> Any:
    """Load a causal or image-text-to-text model, quantised as its checkpoint says.

    Raises:
        AdapterError: no such model, no such class, or whatever transformers says.
    """
    placement = _placement(options)
    source = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "local_files_only": options.local_files_only,
    }
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(model, **source)
        auto_class = _auto_class(config)
        loaded = auto_class.from_pretrained(
            model, dtype=dtype, attn_implementation=options.attn_implementation, **placement, **source
        )
        _own_weights(loaded)
        return loaded if placement else loaded.to(_device(options))
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(f"transformers could not load {model!r}: {error}") from error


def _own_weights(model: torch.nn.Module) -> None:
    """Copy weights that are a mapping of the checkpoint's files: who writes into those would change the target."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter):
            tensor.data = tensor.data.clone()


def _auto_class(config: Any) -> Any:
    auto_map = getattr(config, "auto_map", None) or {}
    for name, mapping in _AUTO_CLASSES.items():
        if name in auto_map or type(config) in mapping:
            return getattr(transformers, name)
    raise AdapterError(
        f"a {config.model_type!r} model is no causal language model: the target must load with "
        f"{' or '.join(_AUTO_CLASSES)}"
    )


def _device(options: HFOptions) -> str:
    return str(resolve_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))


def _placement(options: HFOptions) -> dict[str, Any]:
    has_accelerate = find_spec("accelerate") is not None
    if options.device_map is not None:
        if not has_accelerate:
            raise AdapterError(
                f"device_map {options.device_map!r} needs accelerate: pip install 'eagle-target-hf[device-map]'"
            )
        return {"device_map": options.device_map}
    # With accelerate the weights go straight to the device, and a quantised model needs no `.to`, which some refuse.
    if has_accelerate and torch.device(_device(options)).type != "cpu":
        return {"device_map": {"": _device(options)}}
    return {}
