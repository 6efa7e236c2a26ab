"""CUDA devices by their numbers: `cuda` alone is the calling thread's current device, and every new thread's is 0."""

from __future__ import annotations

import torch

from eagle_target.errors import ConfigError


def resolve_device(device: torch.device | str) -> torch.device:
    """The device of a public entrance, with the number that it has in the calling thread.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    try:
        named = torch.device(device)
        if is_numbered(named):
            return named
        return torch.device(named.type, torch.cuda.current_device())
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used: {error}") from error


def is_numbered(device: torch.device) -> bool:
    """Whether a device is the same one in every thread."""
    return device.type != "cuda" or device.index is not None


def use_device(device: torch.device) -> None:
    """Make a CUDA device the calling thread's current one, for good; nothing to do for others."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
