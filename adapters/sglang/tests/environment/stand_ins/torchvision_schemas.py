"""Start-up hook: declares what PyPI's torchvision, linked to CUDA, cannot register beside a CPU torch.

SGLang imports torchvision, and torchvision registers shapes of `nms` and `qnms` although its library did not load.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchvisionSchemas(MetaPathFinder):
    """Declares the schemas when torchvision is first imported, and finds no module itself."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        del path, target
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for operator in ("nms", "qnms"):
                self.library.define(operator + SCHEMA)


sys.meta_path.insert(0, TorchvisionSchemas())
