"""Copy the outputs of modules into place while a forward runs.

slots = rows*width of the batch in flight, pads included.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from eagle_target_hf.batching import PlannedBatch

_STATES_NAMES = ("last_hidden_state", "hidden_states")


@contextmanager
def capture_outputs(
    modules: Sequence[torch.nn.Module], outputs: Sequence[torch.Tensor], batch: PlannedBatch
) -> Iterator[None]:
    """Copy what each module returns in this thread into its `[tokens, width]` output, until the block ends.

    The hooks live as long as the block: a model shared with other code, or other threads, has none outside it.

    Raises:
        AdapterError: a module did not run, or returned something that is no row for each slot.
    """
    owner = threading.get_ident()
    seen: set[int] = set()
    spans = batch.spans()

    def hook_for(number: int) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            del args
            if threading.get_ident() == owner:
                rows = _slot_rows(module, output, batch, outputs[number].shape[1])
                copy_spans(rows, outputs[number], spans)
                seen.add(number)

        return hook

    handles = [module.register_forward_hook(hook_for(number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missing = [type(module).__name__ for number, module in enumerate(modules) if number not in seen]
    if missing:
        raise AdapterError(f"the target's forward did not run {', '.join(missing)}: its layers cannot be captured")


def copy_spans(slots: torch.Tensor, out: torch.Tensor, spans: Sequence[tuple[int, int, int]]) -> None:
    """Copy runs of `[slots, width]` to their rows of `[tokens, width]`."""
    for slot, token, length in spans:
        out[token : token + length].copy_(slots[slot : slot + length])


def states_of(output: Any) -> Any:
    """The hidden states in what a layer returns: itself, the first of a tuple, or by name."""
    if isinstance(output, Mapping):
        named = [output[name] for name in _STATES_NAMES if output.get(name) is not None]
        return named[0] if named else next(iter(output.values()), None)
    return output[0] if isinstance(output, tuple | list) and output else output


def _slot_rows(module: torch.nn.Module, output: Any, batch: PlannedBatch, width: int) -> torch.Tensor:
    tensor = states_of(output)
    slots = batch.rows * batch.width
    # Not by the number of elements: some architectures have the tokens first and the rows second.
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) not in (
        (batch.rows, batch.width, width),
        (slots, width),
    ):
        shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise AdapterError(
            f"{type(module).__name__} returned {shape}, expected {[batch.rows, batch.width, width]}: "
            "this architecture cannot be captured"
        )
    return tensor.reshape(slots, width)
