"""Hugging Face transformers adapter for eagle-target. Importing it imports neither torch nor transformers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from eagle_target.lazy import load_name
from eagle_target.plugins.hookspecs import hookimpl
from eagle_target_hf.adapter import HFAdapter
from eagle_target_hf.options import HFOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.adapter import Adapter
    from eagle_target_hf.model import HFEagle3TargetModel
    from eagle_target_hf.runner import HFTargetRunner

__all__ = ["HFAdapter", "HFEagle3TargetModel", "HFOptions", "HFTargetRunner"]


@hookimpl
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Register the `hf` adapter."""
    register(HFAdapter)


__getattr__ = partial(load_name, __name__, {"HFEagle3TargetModel": "model", "HFTargetRunner": "runner"})
