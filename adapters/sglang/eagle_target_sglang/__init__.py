"""SGLang adapter for eagle-target. Importing it imports neither torch nor SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eagle_target.plugins.hookspecs import hookimpl
from eagle_target_sglang.adapter import SGLangAdapter
from eagle_target_sglang.options import SGLangOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.adapter import Adapter
    from eagle_target_sglang.model import SGLangEagle3TargetModel
    from eagle_target_sglang.runner import SGLangTargetRunner

__all__ = ["SGLangAdapter", "SGLangEagle3TargetModel", "SGLangOptions", "SGLangTargetRunner"]


@hookimpl
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Register the `sglang` adapter."""
    register(SGLangAdapter)


def __getattr__(name: str) -> Any:
    if name == "SGLangEagle3TargetModel":
        from eagle_target_sglang.model import SGLangEagle3TargetModel

        return SGLangEagle3TargetModel
    if name == "SGLangTargetRunner":
        from eagle_target_sglang.runner import SGLangTargetRunner

        return SGLangTargetRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
