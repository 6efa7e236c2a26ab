"""What the adapter needs of vLLM and of a model, checked in the workers before anything is captured."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interfaces import supports_eagle3

TESTED_VERSIONS = "0.32"
RUNNER_ATTRIBUTES = ("execute_model", "execute_model_state", "use_aux_hidden_state_outputs", "get_model")


def find_obstacle(worker: Any, version: str) -> str | None:
    """Say why hidden states cannot be captured from a worker; None where they can."""
    runner = worker.model_runner
    missing = [name for name in RUNNER_ATTRIBUTES if not hasattr(runner, name)]
    if missing:
        return (
            f"the model runner of vLLM {version} ({type(runner).__name__}) has no {', '.join(missing)}: "
            f"install a version that is tested, {TESTED_VERSIONS}, or use -o capture=connector"
        )
    model = runner.get_model()
    if not supports_eagle3(model):
        return (
            f"vLLM {version} cannot capture hidden states of a {type(model).__name__} (no EAGLE-3 support): "
            "use another version of vLLM, or --engine hf"
        )
    if worker.vllm_config.parallel_config.pipeline_parallel_size > 1:
        return f"vLLM {version} captures no hidden states over pipeline stages: use -o tensor_parallel_size"
    return None
