"""Proof at load that what decoder layers return is the hidden states that the model goes on with.

tokens = those of the probe; all shapes are of one forward.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from eagle_target_hf.capture import states_of
from eagle_target_hf.tolerance import is_close

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target_hf.execution import Execution

_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


class _Observation:
    """One forward, from outside, in this thread: others may run a model that they share with us.

    returned, entered: what layers returned and what they took, by id. beside: what modules beside the list of layers
    took and returned. last: what the decoder returned, `[1, tokens, hidden]`.
    """

    def __init__(self, execution: Execution, ids: torch.Tensor) -> None:
        self.returned: dict[int, Any] = {}
        self.entered: dict[int, Any] = {}
        self.beside: list[tuple[Any, Any]] = []
        self.last: Any = None
        self._owner = threading.get_ident()
        layers, decoder = execution.architecture.layers, execution.decoder
        with ExitStack() as hooks:
            for number, layer in enumerate(layers):
                hook = partial(self._see_layer, number)
                hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            for module in _children_beside(decoder, layers[0]):
                hooks.callback(module.register_forward_hook(self._see_beside).remove)
            hooks.callback(decoder.register_forward_hook(self._see_decoder).remove)
            _run(execution, ids)

    def _see_layer(self, number: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        del module
        if threading.get_ident() == self._owner:
            self.entered[number] = _copy(args[0] if args else kwargs.get("hidden_states"))
            self.returned[number] = _copy(output)

    def _see_beside(self, module: Any, args: Any, output: Any) -> None:
        del module
        if threading.get_ident() == self._owner and args:
            self.beside.append((_copy(args[0]), _copy(output)))

    def _see_decoder(self, module: Any, args: Any, output: Any) -> None:
        del module, args
        if threading.get_ident() == self._owner:
            self.last = states_of(output)


def find_obstacles(execution: Execution, ids: torch.Tensor) -> dict[int, str]:
    """Why layers cannot be captured, by their ids; empty where all can.

    What a layer returns has to be a row for each of the `[tokens]` ids, and what the next layer takes, or, where the
    model does more between its layers, what transformers gives as `hidden_states`. What the last one returns has to be
    what the final norm takes.
    """
    layers = execution.architecture.layers
    observed = _Observation(execution, ids)
    shape = (len(ids), execution.architecture.hidden_size)
    states: dict[int, torch.Tensor] = {}
    obstacles: dict[int, str] = {}
    for number, layer in enumerate(layers):
        name = type(layer).__name__
        if number not in observed.returned:
            obstacles[number] = f"its forward does not run layer {number}, a {name}: it cannot be captured"
            continue
        rows = _rows(observed.returned[number], shape)
        if rows is None:
            given = _describe(observed.returned[number])
            obstacles[number] = f"{name} returns {given}, expected {[1, *shape]}: it cannot be captured"
        else:
            states[number] = rows
    reason = f"what {type(layers[-1]).__name__} returns is not the hidden states that {{}}: it cannot be captured"
    for number in _not_gone_on_with(execution, ids, states, observed):
        obstacles[number] = reason.format("the model goes on with")
    if _is_unlike_normed(states.get(len(layers) - 1), observed):
        obstacles = dict.fromkeys(states, reason.format("the final norm takes")) | obstacles
    return obstacles


def _children_beside(decoder: torch.nn.Module, layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules beside the list of layers, at every depth on the way to it."""
    for child in decoder.children():
        if any(module is layer for module in child.modules()):
            others = [other for other in decoder.children() if other is not child]
            return others if isinstance(child, _LISTS) else others + _children_beside(child, layer)
    return []


def _run(execution: Execution, ids: torch.Tensor, **arguments: Any) -> Any:
    run = execution.architecture.causal_lm if execution.own_logits else execution.decoder
    return run(input_ids=ids[None], use_cache=False, return_dict=True, **arguments)


def _copy(value: Any) -> Any:
    """A copy of the states in a value: what comes after may write to them."""
    tensor = states_of(value)
    return tensor.detach().clone() if isinstance(tensor, torch.Tensor) else tensor


def _rows(value: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """`[tokens, hidden]`, if that is what it is."""
    if not isinstance(value, torch.Tensor) or tuple(value.shape) not in (shape, (1, *shape)):
        return None
    return value.reshape(shape)


def _describe(state: Any) -> str:
    return str(list(state.shape)) if isinstance(state, torch.Tensor) else type(state).__name__


def _not_gone_on_with(
    execution: Execution, ids: torch.Tensor, states: Mapping[int, torch.Tensor], observed: _Observation
) -> list[int]:
    """Layers below the last one that return something else than the model goes on with."""
    count = len(execution.architecture.layers)
    inner = {number: state for number, state in states.items() if number < count - 1}
    # A layer that does not run passes on nothing.
    following = {number: min((other for other in observed.entered if other > number), default=-1) for number in inner}
    unlike = [number for number, state in inner.items() if _differ(state, observed.entered.get(following[number]))]
    if not unlike:
        return []
    # Only now: transformers leaves hooks of its own behind on a model that is asked for them.
    try:
        own = getattr(_run(execution, ids, output_hidden_states=True), "hidden_states", None)
    except Exception:  # noqa: BLE001 - not every model takes the argument
        return unlike
    if not isinstance(own, tuple | list) or len(own) not in (count, count + 1):
        return unlike
    # The list begins with the embeddings, or with the output of the first layer.
    shifts = (1, 0) if len(own) > count else (0, 1)
    found = [
        [number for number in unlike if number + shift >= len(own) or _differ(inner[number], own[number + shift])]
        for shift in shifts
    ]
    return min(found, key=len)


def _differ(given: torch.Tensor, own: Any) -> bool:
    rows = _rows(own, (given.shape[0], given.shape[1]))
    return rows is None or not is_close(given, rows.to(given.device))


def _is_unlike_normed(state: torch.Tensor | None, observed: _Observation) -> bool:
    """Whether a module beside the layers gives the last hidden states, and of something else than the last layer's."""
    if state is None:
        return False
    makers = [
        taken for taken, given in observed.beside if observed.last is not None and not _unequal(given, observed.last)
    ]
    return bool(makers) and all(_differ(state, taken) for taken in makers)


def _unequal(given: Any, last: Any) -> bool:
    return not isinstance(given, torch.Tensor) or given.shape != last.shape or not is_close(given, last)
