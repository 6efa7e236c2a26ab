"""How far two computations of the same numbers may be apart, by their dtype."""

from __future__ import annotations

from typing import Any

import torch


def is_close(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether no element differs by more than rounding, as a part of the largest one."""
    if given.shape != expected.shape:
        return False
    tolerance = 1e-4 if _is_exact(given) and _is_exact(expected) else 1e-2
    finite = expected.isfinite()
    if not torch.equal(given.isfinite(), finite):
        return False
    ours, theirs = (torch.where(finite, tensor.float(), 0.0) for tensor in (given, expected))
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def is_same_direction(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the difference is a small part of the whole; batches of other shapes round differently."""
    tolerance = 1e-3 if _is_exact(given) else 5e-2
    return bool((given.float() - expected.float()).norm() <= tolerance * expected.float().norm())


def _is_exact(tensor: torch.Tensor) -> Any:
    return tensor.dtype in (torch.float32, torch.float64)
