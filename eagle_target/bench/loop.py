"""Takes batches as a trainer does, and times each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    Inputs = Sequence[Item]


def time_batches(
    prefetch: Callable[[Iterable[Item]], Iterator[Any]],
    inputs: Inputs,
    *,
    seconds: float,
    step: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each batch, with what the trainer does to it.

    The time starts when the first batch is here, which is not counted; what is on its way at the end is not, either.

    Args:
        prefetch: gives the batches of items, with some on their way. inputs: the items, taken in turn.
        seconds: how long; at least one batch is taken. step: what a trainer does between batches.
    """
    is_over = False

    def items() -> Iterator[Item]:
        number = 0
        while not is_over:
            yield inputs[number % len(inputs)]
            number += 1

    taken: list[float] = []
    batches = prefetch(items())
    next(batches)
    started = before = time.perf_counter()
    while not taken or before - started < seconds:
        next(batches)
        if step is not None:
            step()
        now = time.perf_counter()
        taken.append(now - before)
        before = now
    is_over = True
    for _ in batches:
        pass
    return taken
