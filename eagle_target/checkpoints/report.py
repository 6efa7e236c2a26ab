"""What transformers reports of a load, judged: which weights are not the checkpoint's, and which leftovers matter."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle_target.checkpoints.files import faults_of_files, is_needless_scale, is_scale_like, list_names
from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from eagle_target.checkpoints.files import StoredTensor

_logger = logging.getLogger(__name__)

# Old checkpoints hold tables that are computed today, and counters.
_COMPUTED = re.compile(
    r"(^|\.)(\w*inv_freq|masked_bias|causal_mask|(attn|attention)\.bias|position_ids|(cos|sin)(_cached)?|alibi"
    r"|embed_positions\.weights|version|num_batches_tracked|relative_position_index)$"
)
# Names that only wrappers of a module put in front.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")
_QUANTISED_REMEDY = (
    "They are scales or parts of quantised weights, and transformers left them out: use a checkpoint as it was "
    "published, with a quantization_config that transformers knows, or one that is not quantised; other engines may "
    "know this form (--engine vllm, --engine sglang)"
)


@dataclass(slots=True)
class LoadReport:
    """What transformers says of a load.

    missing: the model's weights that no file has. unexpected: names in the files that the model has not.
    mismatched: weights of another shape. messages: its own report, where it refused.
    """

    missing: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    mismatched: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def add(self, info: Mapping[str, Iterable[Any]]) -> None:
        """Take what `from_pretrained(..., output_loading_info=True)` gives."""
        self.missing |= set(info["missing_keys"])
        self.unexpected |= set(info["unexpected_keys"])
        self.mismatched |= {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        self.messages += [str(message) for message in info.get("error_msgs", ())]

    def without_quantised(self) -> LoadReport:
        """What remains where quantised weights and their scales have names and shapes of their own."""
        held = [re.split(r"(?<=\.experts\.)", name)[0] for name in self.unexpected if is_scale_like(name)]
        stems = {name if name.endswith(".experts.") else name.rpartition(".")[0] for name in held}
        missing = {
            name
            for name in self.missing
            if name.removesuffix(".weight") not in stems and name.rpartition(".")[0] + "." not in stems
        }
        return LoadReport(missing=missing)


def require_whole(
    name: str, model: Any, report: LoadReport, stored: Mapping[str, StoredTensor], *, is_quantised: bool
) -> None:
    """Refuse a model whose weights are not all the checkpoint's; harmless leftovers are logged.

    Args:
        name: of the checkpoint, for messages.
        model: a loaded transformers model.
        report: what transformers said.
        stored: what the files hold; empty where they cannot be looked at.
        is_quantised: whether transformers knows how the weights are quantised.

    Raises:
        AdapterError: names the weights, and what to do.
    """
    parts = _Parts(model)
    faults = faults_of_files(stored, names=parts.weights, is_quantised=is_quantised)
    faults += _faults_of_missing(report)
    if report.mismatched:
        faults.append(
            f"weights of another shape than config.json says: {list_names(sorted(report.mismatched))}. Use the "
            "config.json of these weights"
        )
    scales, weights, layers, harmless = parts.sort(report.unexpected, is_quantised=is_quantised)
    if scales:
        faults.append(fault_of_scales(scales))
    if weights:
        faults.append(
            f"weights that the model has no place for: {list_names(weights)}. The config.json, or the class that it "
            "names, is not the one of these weights"
        )
    if layers:
        faults.append(
            f"more decoder layers than config.json says: {list_names(layers)}. Set num_hidden_layers to what the files "
            "have"
        )
    if faults:
        raise refusal(name, faults)
    if harmless:
        _logger.info("%s: names that the model does not need: %s", name, list_names(harmless))


def refusal(name: str, faults: Iterable[str]) -> AdapterError:
    """The error for a checkpoint that does not load whole."""
    import transformers

    engine = f"transformers {transformers.__version__}"
    return AdapterError(f"the checkpoint {name!r} does not load whole with {engine}: {'; '.join(faults)}")


def fault_of_scales(names: list[str]) -> str:
    """What is wrong where these were left out."""
    return f"left out: {list_names(names)}. {_QUANTISED_REMEDY}"


class _Parts:
    """Where names belong in a model.

    weights: names of its floating point weights.
    """

    def __init__(self, model: Any) -> None:
        self._modules = {name for name, _ in model.named_modules()}
        self._owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
        state = model.state_dict()
        self._names = set(state)
        self.weights = {name for name, value in state.items() if value.is_floating_point()}
        paths = {id(module): name for name, module in model.named_modules()}
        self._decoder = paths.get(id(_part(model, "get_decoder")), "")
        self._head = paths.get(id(_part(model, "get_output_embeddings")))

    def sort(
        self, unexpected: Iterable[str], *, is_quantised: bool
    ) -> tuple[list[str], list[str], list[str], list[str]]:
        """Names that the model has not, as: scales of weights, weights, whole decoder layers, and harmless ones."""
        scales: list[str] = []
        weights: list[str] = []
        outside: list[str] = []
        harmless: list[str] = []
        for name in sorted(unexpected):
            owner = self._owner(name)
            if _COMPUTED.search(name) or is_needless_scale(name, is_quantised=is_quantised):
                harmless.append(name)
            elif is_scale_like(name) and (owner in self._owners or _is_numbered(owner)):
                scales.append(name)
            elif self._is_text(owner):
                weights.append(name)
            else:
                outside.append(name)
        layers = self._further_layers(outside)
        return scales, weights, layers, harmless + [name for name in outside if name not in layers]

    def _owner(self, name: str) -> str:
        """The innermost module that there is on the way to a name."""
        while name and name not in self._modules:
            name = name.rpartition(".")[0]
        return name

    def _is_text(self, owner: str) -> bool:
        if owner == self._head:
            return True
        start = f"{self._decoder}." if self._decoder else ""
        inside = owner.startswith(start) and owner != ""
        return inside and (_is_numbered(owner.removeprefix(start)) or owner in self._owners)

    def _further_layers(self, names: list[str]) -> list[str]:
        """Names of layers like the decoder's own, numbered above them. Those of next-token heads hold more."""
        groups: dict[str, list[str]] = {}
        for name in names:
            match = re.match(r"(.*?\.)(\d+)\.", name)
            if match and f"{match[1]}0" in self._modules and self._is_text(f"{match[1]}0"):
                groups.setdefault(match[0], []).append(name)
        further: list[str] = []
        for start, found in groups.items():
            stack = re.escape(start.rstrip(".").rpartition(".")[0])
            own = {re.sub(rf"^{stack}\.\d+\.", "", name) for name in self._names}
            if {name.removeprefix(start) for name in found} <= own:
                further += found
        return further


def _is_numbered(owner: str) -> bool:
    return any(part.isdigit() for part in owner.split("."))


def _part(model: Any, method: str) -> Any:
    function = getattr(model, method, None)
    try:
        return function() if callable(function) else None
    except (NotImplementedError, AttributeError):
        return None


def _faults_of_missing(report: LoadReport) -> list[str]:
    if not report.missing:
        return []
    remedy = "Copy the checkpoint again, whole; a model without its LM head cannot be a target"
    for wrapper in _WRAPPERS:
        if {name.removeprefix(wrapper) for name in report.unexpected if name.startswith(wrapper)} & report.missing:
            remedy = f"The files name them {wrapper!r}...: save the module that is wrapped, or take that off the names"
    if report.unexpected and "wrapped" not in remedy:
        remedy += f". The files have other names: {list_names(sorted(report.unexpected))}"
    return [f"missing, so that random numbers would take their place: {list_names(sorted(report.missing))}. {remedy}"]
