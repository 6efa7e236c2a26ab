"""vLLM adapter for eagle-target. Importing it imports neither torch nor vllm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from eagle_target.lazy import load_name
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


__getattr__ = partial(load_name, __name__, {"VLLMEagle3TargetModel": "model", "VLLMTargetRunner": "runner"})
