"""Hidden states of one forward, taken on their way into SGLang's logits processor.

tokens = sum of the sequences; aux `[tokens, 3*hidden]`, last `[tokens, hidden]` after the final norm.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import AdapterError
from eagle_target_sglang import generations

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """What one forward gave."""

    aux: torch.Tensor
    last: torch.Tensor


class Capture:
    """Chooses layers and takes hidden states by a hook before the logits processor.

    The hook hands the processor one row, so that SGLang makes no logits for the others. SGLang takes the output of
    layer i at layer i + 1, so of the last layer there is none: it is taken before the final norm.

    Attributes:
        processor: SGLang's logits processor. lm_head: what the model projects with, known after the first forward.

    Raises:
        AdapterError: SGLang cannot capture layers of this model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        if not hasattr(model, "set_eagle3_layers_to_capture"):
            raise AdapterError(
                f"SGLang's {type(model).__name__} has no set_eagle3_layers_to_capture: its layers cannot be captured. "
                "Use --engine hf, or a newer SGLang"
            )
        self.processor = _find_processor(model)
        self.lm_head: Any = None
        self._num_aux = 0
        self._aux: Any = None
        self._last: torch.Tensor | None = None
        self._before_norm: torch.Tensor | None = None
        self._norm_hook: Any = None
        self._hook = self.processor.register_forward_pre_hook(self._before_processor, with_kwargs=True)

    def set_layers(self, aux_layer_ids: Sequence[int], num_layers: int) -> None:
        """Capture the outputs of these layers, ascending.

        Raises:
            AdapterError: the last layer of a model whose final norm is not where it is looked for.
        """
        if self._norm_hook is not None:
            self._norm_hook.remove()
            self._norm_hook = None
        early = [layer for layer in aux_layer_ids if layer < num_layers - 1]
        if len(early) < len(aux_layer_ids):
            self._norm_hook = self._final_norm(num_layers).register_forward_pre_hook(self._before_final_norm)
        self._num_aux = len(aux_layer_ids)
        generations.choose_layers(self._model, early)

    def forward(self, model_runner: Any, rows: Sequence[Sequence[int]]) -> Captured:
        """Run sequences and take their hidden states; nothing is left captured.

        Raises:
            AdapterError: another number of layers or rows came than was asked for.
        """
        try:
            self._run(model_runner, rows)
            return self._check(sum(len(row) for row in rows))
        finally:
            self._aux = self._last = self._before_norm = None

    def close(self) -> None:
        """Take the hooks off."""
        self._hook.remove()
        if self._norm_hook is not None:
            self._norm_hook.remove()

    def _run(self, model_runner: Any, rows: Sequence[Sequence[int]]) -> None:
        generations.run_extend(model_runner, rows, return_hidden_states=False)

    def _check(self, tokens: int) -> Captured:
        aux = [] if self._aux is None else [self._aux] if isinstance(self._aux, torch.Tensor) else list(self._aux)
        if self._before_norm is not None:
            aux.append(self._before_norm)
        if self._last is None or not aux:
            raise AdapterError("SGLang gave no hidden states: the model did not run through its logits processor")
        packed = torch.cat(aux, dim=-1) if len(aux) > 1 else aux[0]
        expected = self._num_aux * self._last.shape[-1]
        if packed.shape != (tokens, expected) or len(self._last) != tokens:
            raise AdapterError(
                f"SGLang gave aux hidden states {list(packed.shape)} and last hidden states {list(self._last.shape)}, "
                f"expected [{tokens}, {expected}] and [{tokens}, ...]: the rows would be another token's"
            )
        return Captured(packed, self._last)

    def _before_processor(self, processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(type(processor).forward).bind(processor, *args, **kwargs).arguments
        self.lm_head = given["lm_head"]
        self._last = given["hidden_states"]
        self._aux = given.get("aux_hidden_states")
        one_row = (given["input_ids"], given["hidden_states"][:1], given["lm_head"], generations.one_row_metadata())
        return one_row, {}

    def _before_final_norm(self, norm: Any, args: tuple[Any, ...]) -> None:
        del norm
        hidden, residual = args[0], args[1] if len(args) > 1 else None
        # A copy in either case: norms write into their arguments.
        self._before_norm = hidden.clone() if residual is None else hidden + residual

    def _final_norm(self, num_layers: int) -> torch.nn.Module:
        for module in self._model.modules():
            norm, layers = getattr(module, "norm", None), getattr(module, "layers", None)
            is_stack = isinstance(layers, torch.nn.ModuleList) and len(layers) == num_layers
            if is_stack and isinstance(norm, torch.nn.Module):
                return norm
        raise AdapterError(
            f"the last layer of SGLang's {type(self._model).__name__} cannot be captured: choose another one"
        )


class OfficialCapture(Capture):
    """Takes what SGLang returns under `enable_return_aux_hidden_states`, from 0.5.23; the last layer it has not."""

    def set_layers(self, aux_layer_ids: Sequence[int], num_layers: int) -> None:
        """Capture the outputs of these layers, ascending.

        Raises:
            AdapterError: the last layer.
        """
        if max(aux_layer_ids) == num_layers - 1:
            raise AdapterError(
                f"capture=official cannot take layer {num_layers - 1}, the last: choose another one, or capture=hook"
            )
        super().set_layers(aux_layer_ids, num_layers)

    def _run(self, model_runner: Any, rows: Sequence[Sequence[int]]) -> None:
        output = generations.run_extend(model_runner, rows, return_hidden_states=True)
        self._aux, self._last = output.hidden_states, output.last_hidden_states

    def _before_processor(self, processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.lm_head = inspect.signature(type(processor).forward).bind(processor, *args, **kwargs).arguments["lm_head"]


def _find_processor(model: Any) -> Any:
    found = [module for module in model.modules() if type(module).__name__ == "LogitsProcessor"]
    if len(found) != 1:
        raise AdapterError(f"SGLang's {type(model).__name__} has {len(found)} logits processors, expected one")
    return found[0]
