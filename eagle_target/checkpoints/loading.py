"""Whether a checkpoint loads whole, found out by transformers: while it loads, or from names and shapes alone."""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_target.checkpoints.files import (
    TORCH_DTYPES,
    find_folder,
    has_all_files,
    is_scale_like,
    list_names,
    read_stored,
)
from eagle_target.checkpoints.report import LoadReport, fault_of_scales, refusal, require_whole
from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.checkpoints.files import StoredTensor

_logger = logging.getLogger(__name__)

_QUANTISATIONS = ("quantization_config", "compression_config")

# In transformers' report of a load.
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_SHAPES = re.compile(r"Reinit due to size mismatch - ckpt: torch\.Size\((.*?)\) vs model: ?torch\.Size\((.*?)\)")


def check_checkpoint(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, remedy: str = ""
) -> bool:
    """Load a checkpoint that is on this machine into a model without memory, and refuse it where it is not whole.

    No values are read. Of a quantised checkpoint only that is judged which is neither packed nor a scale, for each
    engine has its own ways to load those.

    Args:
        name, revision, trust_remote_code: as for `from_pretrained`.
        remedy: what else to do, for the message.

    Returns:
        Whether it could be judged: it is here, and transformers knows its architecture.

    Raises:
        AdapterError: names the weights, and what to do.
    """
    try:
        problem = _check(name, revision=revision, trust_remote_code=trust_remote_code)
    except AdapterError as error:
        raise AdapterError(f"{error}. {remedy}" if remedy else str(error)) from error
    except Exception as error:  # noqa: BLE001 - the engine's own loader says what is wrong
        problem = f"{type(error).__name__}: {error}"
    if problem:
        _logger.info("%s was not checked for missing weights: %s", name, problem)
    return not problem


def _check(name: str, *, revision: str | None, trust_remote_code: bool) -> str:
    """Refuse a checkpoint that is not whole, or say why it cannot be judged."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    folder = find_folder(name, revision)
    stored = stored_weights(name, config, folder)
    if folder is None or not stored:
        return "its files are not here"
    is_quantised = _is_quantised(config, folder)
    report = LoadReport()
    try:
        with load_report(report):
            model = _load_without_values(
                config, stored, report, trust_remote_code=trust_remote_code, is_quantised=is_quantised
            )
    except Exception as error:
        if report.messages:
            raise refusal(name, report.messages) from error
        raise
    if is_quantised:
        report = report.without_quantised()
    require_whole(name, model, report, stored, is_quantised=is_quantised)
    return ""


def stored_weights(name: str, config: Any, folder: Path | None) -> dict[str, StoredTensor]:
    """What the files of a path or a hub id hold; empty where they are not all fetched yet.

    Raises:
        AdapterError: files of a path that its index names are not there, or one is cut short.
    """
    file_name = getattr(config, "transformers_weights", None)
    if folder is None or not (Path(name).is_dir() or has_all_files(folder, file_name)):
        return {}
    return read_stored(folder, file_name)


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a target with this config; None if there is none."""
    import transformers
    from transformers.models.auto import modeling_auto

    auto_map = getattr(config, "auto_map", None) or {}
    for name, mapping in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if name in auto_map or type(config) in mapping:
            return getattr(transformers, name)
    return None


def require_known_quantisation(name: str, config: Any, folder: Path | None) -> bool:
    """Whether transformers will load the weights as quantised.

    Raises:
        AdapterError: they are quantised in a way that it does not know and would skip.
    """
    from transformers.quantizers import AutoHfQuantizer

    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    if found is None:
        found = getattr(config, "compression_config", None)
        own_file = None if folder is None else _modelopt_algorithm(folder)
        if own_file is None and found is None:
            return False
        known = False
        method = f"hf_quant_config.json: {own_file}" if own_file else "compression_config"
    else:
        settings = found if isinstance(found, dict) else found.to_dict()
        known = bool(AutoHfQuantizer.supports_quant_method(settings))
        method = f"quant_method: {settings.get('quant_method')}"
    if not known:
        raise refusal(
            name,
            [
                f"its weights are quantised in a way that this transformers does not know and skips ({method}). Use "
                "an engine that knows it (--engine vllm, --engine sglang), or a checkpoint that is not quantised"
            ],
        )
    return True


@contextmanager
def load_report(report: LoadReport) -> Iterator[None]:
    """Keep transformers' own report of a load out of the log; where it refuses, what it named is in `messages`."""
    logger = logging.getLogger("transformers.modeling_utils")
    shown_from, level = logger.getEffectiveLevel(), logger.level
    texts: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" in record.getMessage():
            texts.append(record.getMessage())
            return False
        return record.levelno >= shown_from

    logger.addFilter(keep)
    if shown_from > logging.WARNING:
        logger.setLevel(logging.WARNING)
    try:
        yield
    except Exception:
        report.messages += [fault for text in texts for fault in _faults_of_report(text)]
        raise
    finally:
        logger.setLevel(level)
        logger.removeFilter(keep)


def _faults_of_report(text: str) -> Iterator[str]:
    """The rows of transformers' table that made it refuse."""
    plain = _SHAPES.sub(r"\1, not \2", _COLOURS.sub("", text))
    rows = [" ".join(line.replace("|", " ").split()) for line in plain.split("Notes:")[0].splitlines()]
    for kind, says in (
        ("MISMATCH", "weights of another shape than config.json says"),
        ("CONVERSION", "parts of these weights are missing, or have another shape than config.json says"),
    ):
        found = [row.replace(f" {kind} ", ": ").removesuffix(f" {kind}") for row in rows if f" {kind}" in row]
        if found:
            yield f"{says}: {list_names(found)}. Copy the checkpoint again, whole, with its own config.json"
    unexpected = [row.partition(" UNEXPECTED")[0] for row in rows if " UNEXPECTED" in row]
    scales = [name for name in unexpected if is_scale_like(name)]
    if scales:
        yield fault_of_scales(scales)


def _is_quantised(config: Any, folder: Path) -> bool:
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = [getattr(each, name, None) for each in (config, text_config) for name in _QUANTISATIONS]
    return any(found) or _modelopt_algorithm(folder) is not None


def _modelopt_algorithm(folder: Path) -> str | None:
    """How NVIDIA's ModelOpt quantised the weights, as its own file says; None if it did not."""
    path = folder / "hf_quant_config.json"
    if not path.exists():
        return None
    algorithm = json.loads(path.read_text(encoding="utf-8")).get("quantization", {}).get("quant_algo")
    return None if algorithm is None else str(algorithm)


def _load_without_values(
    config: Any, stored: Mapping[str, StoredTensor], report: LoadReport, *, trust_remote_code: bool, is_quantised: bool
) -> Any:
    import torch

    if is_quantised:
        # As if it were not: what is packed has another name or shape then, and what is not must be there.
        for each in (config, config.get_text_config(decoder=True)):
            for name in _QUANTISATIONS:
                vars(each).pop(name, None)
    tensors = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, TORCH_DTYPES.get(tensor.dtype, "uint8")), device="meta")
        for name, tensor in stored.items()
    }
    chosen = auto_class(config)
    if chosen is None:
        raise ValueError(f"no class for a {config.model_type!r} model")
    with torch.device("meta"):
        model_class = type(chosen.from_config(config, trust_remote_code=trust_remote_code))
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        device_map={"": "meta"},
        ignore_mismatched_sizes=is_quantised,
        output_loading_info=True,
    )
    report.add(info)
    return model
