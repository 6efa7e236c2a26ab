"""Import-only stand-in for SGLang's CUDA kernels: every name imports, every call raises. Nothing here computes.

PyPI has no CPU build of `sgl-kernel`; with SGLANG_USE_CPU_ENGINE=1 and torch_native attention SGLang imports names from
it and calls none.
"""

from __future__ import annotations

from typing import Any, NoReturn


class _Kernel:
    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{self.__name__} has no CPU build: this environment only imports it")


def __getattr__(name: str) -> Any:
    # SGLang takes its own fallback where the submodule scalar_type is missing.
    if name == "scalar_type" or (name.startswith("__") and name.endswith("__")):
        raise AttributeError(name)
    return _Kernel(name)
