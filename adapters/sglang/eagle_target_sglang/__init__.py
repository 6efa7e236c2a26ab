"""SGLang adapter for eagle-target. Importing it imports neither torch nor SGLang."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from eagle_target.lazy import load_name
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


__getattr__ = partial(load_name, __name__, {"SGLangEagle3TargetModel": "model", "SGLangTargetRunner": "runner"})
