"""The target's own head, for hidden states that are already there; and its rows for the draft.

n = rows of hidden states or token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.contract.runner import DraftHead

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target_hf.architecture import Architecture

_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
_DIVISORS = ("logits_scaling",)
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


class OwnHead:
    """`[n, hidden]` -> `[n, vocab]` by the causal LM's own forward, its decoder replaced by the hidden states.

    So soft-cap, scale, bias and whatever else an architecture does come along. The model itself is not touched, and
    every call makes its own replacement, so threads cannot mix.
    """

    def __init__(self, architecture: Architecture, decoder_path: tuple[str, ...], output_type: type[Any]) -> None:
        self._architecture = architecture
        self._path = decoder_path
        self._output_type = output_type

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in the dtype that the model gives, on the device of the hidden states."""
        rows = hidden[None]
        output = (rows, None) if self._output_type is tuple else self._output_type(last_hidden_state=rows)
        causal_lm = self._architecture.causal_lm
        stand_in = _with_decoder(causal_lm, self._path, output)
        ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=hidden.device)
        # The class's forward: an instance's own may be bound to the original by accelerate or torch.compile.
        result = type(causal_lm).forward(stand_in, input_ids=ids, use_cache=False, return_dict=True)
        logits: torch.Tensor = result.logits[0, :, : self._architecture.vocab_size]
        return logits.to(hidden.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadForm:
    """What a plain head does to its logits; see `DraftHead`."""

    logit_scale: float
    soft_cap: float | None

    def rows(self, architecture: Architecture, token_ids: torch.Tensor) -> DraftHead | None:
        """Rows of the head for `[n]` ids; None where its weight is not plain."""
        module = architecture.output_embedding()
        weight: Any = getattr(module, "weight", None)
        if not is_plain(weight) or weight.shape[1] != architecture.hidden_size:
            return None
        bias: Any = getattr(module, "bias", None)
        ids = token_ids.to(weight.device)
        return DraftHead(
            weight=weight.detach().index_select(0, ids),
            bias=bias.detach().index_select(0, ids) if is_plain(bias) else None,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )


def candidate_forms(config: Any) -> Iterator[HeadForm]:
    """Every form that the config's numbers can mean, the likeliest first."""
    scales = [float(getattr(config, name)) for name in _SCALES if _is_number(getattr(config, name, None))]
    divisors = [1 / float(getattr(config, name)) for name in _DIVISORS if _is_number(getattr(config, name, None))]
    caps = [float(getattr(config, name)) for name in _SOFT_CAPS if _is_number(getattr(config, name, None))]
    for scale, cap in product(dict.fromkeys([*divisors, *scales, 1.0]), dict.fromkeys([*caps, None])):
        yield HeadForm(logit_scale=scale, soft_cap=cap)


def is_plain(tensor: Any) -> bool:
    """Whether a parameter holds its numbers as they are: neither quantised, nor sharded, nor offloaded."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor.data) is torch.Tensor
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and tensor.device.type != "meta"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 0


class _GivenOutput:
    """Stands where a decoder stood: returns what it was given, is the decoder in everything else."""

    def __init__(self, decoder: torch.nn.Module, output: Any) -> None:
        self._decoder = decoder
        self._output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def _with_decoder(module: Any, path: tuple[str, ...], output: Any) -> Any:
    """Return a shallow copy of a module whose submodule at `path` gives `output`; weights are shared, hooks are not."""
    if not path:
        return _GivenOutput(module, output)
    children = dict(vars(module)["_modules"])
    children[path[0]] = _with_decoder(children[path[0]], path[1:], output)
    copy = object.__new__(type(module))
    copy.__dict__.update(vars(module), _modules=children)
    return copy
