"""What the installed version of SGLang is tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target_sglang import SGLangAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable

OLDEST = "0.5.9"
ON_THE_OLDEST = ("llama", "qwen3")


def on_this_version(architectures: Iterable[str]) -> list[str]:
    """Those of the architectures that the installed version is tested on."""
    old = SGLangAdapter.engine_version() == OLDEST
    return [name for name in architectures if not old or name in ON_THE_OLDEST]
