"""From a path or a hub id to a loaded transformers model."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from eagle_target.checkpoints.files import find_folder, list_names
from eagle_target.checkpoints.loading import auto_class, load_report, require_known_quantisation, stored_weights
from eagle_target.checkpoints.report import LoadReport, refusal, require_whole
from eagle_target.devices import resolve_device
from eagle_target.errors import AdapterError
from eagle_target_hf.head import is_plain
from eagle_target_hf.tables import restore_tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target_hf.options import HFOptions


def load_model(model: str, options: HFOptions) -> Any:
    """Load a causal or image-text-to-text model, quantised as its checkpoint says.

    Raises:
        AdapterError: no such model, no such class, not all of its weights are the checkpoint's, or whatever
            transformers says.
    """
    placement = _placement(options)
    source = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "local_files_only": options.local_files_only,
    }
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    report = LoadReport()
    try:
        config = transformers.AutoConfig.from_pretrained(model, **source)
        folder = _folder(model, options)
        is_quantised = require_known_quantisation(model, config, folder)
        stored = stored_weights(model, config, folder)
        with load_report(report):
            loaded, info = _class_for(config).from_pretrained(
                model,
                dtype=dtype,
                attn_implementation=options.attn_implementation,
                output_loading_info=True,
                **placement,
                **source,
            )
        report.add(info)
        # Files of the Hub are here by now.
        stored = stored or stored_weights(model, config, find_folder(model, options.revision))
        require_whole(model, loaded, report, stored, is_quantised=is_quantised)
        if type(loaded).__module__.startswith("transformers_modules"):
            restore_tables(loaded)
        _require_values(model, loaded)
        _own_weights(loaded)
        return loaded if placement else loaded.to(_device(options))
    except AdapterError:
        raise
    except Exception as error:
        if report.messages:
            raise refusal(model, report.messages) from error
        raise AdapterError(f"transformers could not load {model!r}: {error}") from error


def _own_weights(model: torch.nn.Module) -> None:
    """Copy weights that are a mapping of the checkpoint's files: who writes into those would change the target."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter):
            tensor.data = tensor.data.clone()


def _class_for(config: Any) -> Any:
    found = auto_class(config)
    if found is None:
        raise AdapterError(
            f"a {config.model_type!r} model is no causal language model: the target must load with "
            "AutoModelForCausalLM or AutoModelForImageTextToText"
        )
    return found


def _require_values(model: str, loaded: torch.nn.Module) -> None:
    empty = sorted(_without_memory(loaded))
    if empty:
        raise refusal(model, [f"left without values: {list_names(empty)}"])
    broken = sorted(_not_finite(loaded))
    if broken:
        raise refusal(
            model,
            [f"numbers that are not finite: {list_names(broken)}. Copy the checkpoint again, or use another dtype"],
        )


def _folder(model: str, options: HFOptions) -> Path | None:
    """Where the checkpoint lies, with what may lie beside its weights.

    Raises:
        AdapterError: it is an adapter over another model.
    """
    if not Path(model).is_dir():
        for name in ("adapter_config.json", "hf_quant_config.json"):
            _fetch(model, name, options)
    folder = find_folder(model, options.revision)
    if folder is not None and (folder / "adapter_config.json").exists():
        raise AdapterError(
            f"{model!r} has a PEFT adapter (adapter_config.json): merge it into its model (merge_and_unload, "
            "save_pretrained) and load that"
        )
    return folder


def _fetch(model: str, name: str, options: HFOptions) -> None:
    """Have a file of the Hub here that transformers would not fetch, if there is one."""
    with suppress(OSError):
        transformers.utils.cached_file(
            model, name, revision=options.revision, local_files_only=options.local_files_only
        )


def _without_memory(model: torch.nn.Module) -> Iterator[str]:
    """Weights and buffers on the meta device that accelerate does not bring in when they are needed."""
    for path, module in model.named_modules():
        if not hasattr(module, "_hf_hook"):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.device.type == "meta":
                    yield f"{path}.{name}".lstrip(".")


def _not_finite(model: torch.nn.Module) -> Iterator[str]:
    for name, weight in model.named_parameters():
        if is_plain(weight) and weight.numel():
            # One pass without a copy; either end is nan where any number is.
            low, high = torch.aminmax(weight.detach())
            if not bool(low.isfinite() & high.isfinite()):
                yield name


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
