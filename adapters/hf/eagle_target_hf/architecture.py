"""Where a transformers model keeps what supervision needs: its decoder layers, embeddings and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eagle_target.errors import AdapterError

_LAYER_LIST_NAMES = ("layers", "h", "blocks", "block")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Architecture:
    """The parts of one loaded model.

    causal_lm: the module whose forward gives the logits. layers: its decoder layers, first to last.
    config: the text part of its config. length_boundary: sequences longer than this use other rotary frequencies.
    """

    causal_lm: torch.nn.Module
    layers: tuple[torch.nn.Module, ...]
    config: Any
    hidden_size: int
    vocab_size: int
    max_seq_len: int | None
    length_boundary: int | None

    @property
    def name(self) -> str:
        """Class of the model."""
        return type(self.causal_lm).__name__

    @property
    def is_flash(self) -> bool:
        """Whether attention runs in a variable-length flash kernel."""
        return "flash" in str(getattr(self.config, "_attn_implementation", None))

    def input_embedding(self) -> torch.Tensor:
        """The input embedding's weight, `[at least vocab, hidden]`."""
        weight = getattr(_call(self.causal_lm, "get_input_embeddings"), "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise AdapterError(f"{self.name} has no input embedding with a weight")
        return weight

    def output_embedding(self) -> Any:
        """The LM head's module; None where the model names none."""
        return _call(self.causal_lm, "get_output_embeddings")

    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding, unless its weights are offloaded."""
        weights = (self.input_embedding(), *self.causal_lm.parameters())
        return next((weight.device for weight in weights if weight.device.type != "meta"), torch.device("cpu"))

    def decoder_paths(self) -> list[tuple[str, ...]]:
        """Paths of the modules that may give the last hidden states, the likeliest first."""
        named = (getattr(self.causal_lm, name, None) for name in ("base_model", "model"))
        found = [_path_to(self.causal_lm, module) for module in (*named, _call(self.causal_lm, "get_decoder"))]
        return list(dict.fromkeys(path for path in found if path))


def find_architecture(model: torch.nn.Module) -> Architecture:
    """Find the parts of a loaded causal or image-text-to-text model.

    Raises:
        AdapterError: no causal language model, or no list of decoder layers.
    """
    causal_lm = _find_causal_lm(model)
    config = _text_config(getattr(model, "config", None))
    num_layers, hidden, vocab = (
        _size(config, model, key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    max_seq_len = getattr(config, "max_position_embeddings", None)
    return Architecture(
        causal_lm=causal_lm,
        layers=_find_layers(causal_lm, num_layers),
        config=config,
        hidden_size=hidden,
        vocab_size=vocab,
        max_seq_len=max_seq_len if isinstance(max_seq_len, int) and max_seq_len > 0 else None,
        length_boundary=_length_boundary(config),
    )


def module_at(root: torch.nn.Module, path: tuple[str, ...]) -> torch.nn.Module:
    """The submodule at a path."""
    return root.get_submodule(".".join(path))


def _find_causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    # A wrapper of an older transformers keeps a whole causal model, head included, in `language_model`.
    for candidate in (model, getattr(model, "language_model", None)):
        if isinstance(candidate, torch.nn.Module) and _call(candidate, "get_output_embeddings") is not None:
            return candidate
    raise AdapterError(
        f"{type(model).__name__} is no causal language model: load it with AutoModelForCausalLM or "
        "AutoModelForImageTextToText"
    )


def _text_config(config: Any) -> Any:
    text_config = getattr(config, "get_text_config", None)
    return config if text_config is None else text_config(decoder=True)


def _size(config: Any, model: torch.nn.Module, key: str) -> int:
    value = getattr(config, key, None)
    if not isinstance(value, int):
        raise AdapterError(f"the config of {type(model).__name__} has no {key}")
    return value


def _find_layers(causal_lm: torch.nn.Module, num_layers: int) -> tuple[torch.nn.Module, ...]:
    decoder = _call(causal_lm, "get_decoder")
    for root in (decoder, causal_lm):
        if not isinstance(root, torch.nn.Module):
            continue
        lists = [
            (name.count("."), name.rpartition(".")[2] not in _LAYER_LIST_NAMES, name, module)
            for name, module in root.named_modules()
            if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict) and len(module) == num_layers
        ]
        if lists:
            # The shallowest: a mixture of experts can have as many experts in a layer as the model has layers.
            return tuple(min(lists, key=lambda entry: entry[:3])[3].children())
    raise AdapterError(f"{type(causal_lm).__name__} has no list of {num_layers} decoder layers: it cannot be captured")


def _length_boundary(config: Any) -> int | None:
    """Longest sequence with the short factors of `longrope`, which transformers chooses for a whole batch."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for entry in (rope, *rope.values()):
        if isinstance(entry, dict) and entry.get("rope_type", entry.get("type")) == "longrope":
            original = entry.get("original_max_position_embeddings")
            return original or getattr(config, "original_max_position_embeddings", None)
    return None


def _path_to(root: torch.nn.Module, wanted: Any) -> tuple[str, ...]:
    if wanted is None or wanted is root:
        return ()
    name = next((name for name, module in root.named_modules() if module is wanted), "")
    return tuple(name.split(".")) if name else ()


def _call(module: torch.nn.Module, method: str) -> Any:
    function = getattr(module, method, None)
    try:
        return function() if callable(function) else None
    except NotImplementedError:
        return None
