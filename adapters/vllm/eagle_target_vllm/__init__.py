"""vLLM adapter for eagle-target. Importing it imports neither torch nor vllm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eagle_target.plugins.hookspecs import hookimpl
from eagle_target_vllm.adapter import VLLMAdapter
from eagle_target_vllm.options import VLLMOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.plugins.adapter import Adapter
    from eagle_target_vllm.model import VLLMEagle3TargetModel
    from eagle_target_vllm.runner import VLLMTargetRunner

__all__ = ["VLLMAdapter", "VLLMEagle3TargetModel", "VLLMOptions", "VLLMTargetRunner"]


@hookimpl
def register_adapters(register: Callable[[type[Adapter]], None]) -> None:
    """Register the `vllm` adapter."""
    register(VLLMAdapter)


def __getattr__(name: str) -> Any:
    if name == "VLLMEagle3TargetModel":
        from eagle_target_vllm.model import VLLMEagle3TargetModel

        return VLLMEagle3TargetModel
    if name == "VLLMTargetRunner":
        from eagle_target_vllm.runner import VLLMTargetRunner

        return VLLMTargetRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
