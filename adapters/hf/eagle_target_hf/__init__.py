"""Hugging Face transformers adapter for eagle-target. Importing it imports neither torch nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name == "HFEagle3TargetModel":
        from eagle_target_hf.model import HFEagle3TargetModel

        return HFEagle3TargetModel
    if name == "HFTargetRunner":
        from eagle_target_hf.runner import HFTargetRunner

        return HFTargetRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
