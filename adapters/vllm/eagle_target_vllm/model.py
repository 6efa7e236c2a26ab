"""The target in the trainer's own process, under vLLM."""

from __future__ import annotations

from eagle_target.colocated import PretrainedEagle3TargetModel
from eagle_target_vllm.adapter import VLLMAdapter


class VLLMEagle3TargetModel(PretrainedEagle3TargetModel):
    """Supervision from a vLLM engine of this process's own; options of `from_pretrained` are those of `VLLMOptions`."""

    adapter = VLLMAdapter
