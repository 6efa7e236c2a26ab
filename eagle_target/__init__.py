"""EAGLE-3 training supervision from a frozen target, whatever engine runs it.

Names are loaded on first use, so that importing the package imports no torch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from eagle_target.lazy import load_name

if TYPE_CHECKING:
    from eagle_target.backend import BatchHandle, Eagle3TargetBackend
    from eagle_target.client.remote import RemoteEagle3TargetModel
    from eagle_target.colocated import RunnerEagle3TargetModel
    from eagle_target.compute.supervise import compute_supervision
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
    from eagle_target.contract.target import ServedTarget, TargetInfo, default_eagle3_aux_layer_ids
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.server.engine.server import TargetModelServer
    from eagle_target.targets import load_target, open_target

_HOMES = {
    "BatchHandle": "backend",
    "DraftHead": "contract.runner",
    "Eagle3TargetBackend": "backend",
    "Eagle3TargetBatch": "contract.batch",
    "RemoteEagle3TargetModel": "client.remote",
    "RunnerEagle3TargetModel": "colocated",
    "ServedTarget": "contract.target",
    "SupervisionRequest": "contract.request",
    "TargetForward": "contract.runner",
    "TargetInfo": "contract.target",
    "TargetModelServer": "server.engine.server",
    "TargetRunner": "contract.runner",
    "VocabMapping": "contract.vocab_mapping",
    "compute_supervision": "compute.supervise",
    "default_eagle3_aux_layer_ids": "contract.target",
    "load_target": "targets",
    "open_target": "targets",
}

__all__ = [
    "BatchHandle",
    "DraftHead",
    "Eagle3TargetBackend",
    "Eagle3TargetBatch",
    "RemoteEagle3TargetModel",
    "RunnerEagle3TargetModel",
    "ServedTarget",
    "SupervisionRequest",
    "TargetForward",
    "TargetInfo",
    "TargetModelServer",
    "TargetRunner",
    "VocabMapping",
    "compute_supervision",
    "default_eagle3_aux_layer_ids",
    "load_target",
    "open_target",
]

__getattr__ = partial(load_name, __name__, _HOMES)
