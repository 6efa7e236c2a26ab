"""vLLM's executors, which also tell their workers what to capture before the model is compiled."""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

# Key of vLLM's `additional_config`: it reaches every process, and compiled graphs are cached by it.
CONFIG_KEY = "eagle_target"


class UniProcTargetExecutor(UniProcExecutor):  # type: ignore[misc]
    """One worker, in the engine's process."""

    def _init_executor(self) -> None:
        super()._init_executor()
        _prepare_workers(self)


class MultiprocTargetExecutor(MultiprocExecutor):  # type: ignore[misc]
    """Each worker in a process of its own."""

    def _init_executor(self) -> None:
        super()._init_executor()
        _prepare_workers(self)


def target_executor(executor_class: type) -> type:
    """Ours for one of vLLM's.

    Raises:
        ValueError: one that has none.
    """
    for ours in (UniProcTargetExecutor, MultiprocTargetExecutor):
        if executor_class is ours.__base__:
            return ours
    raise ValueError(f"the workers of a {executor_class.__name__} cannot be told what to capture")


def _prepare_workers(executor: Any) -> None:
    plan = executor.vllm_config.additional_config.get(CONFIG_KEY)
    if plan is not None:
        executor.collective_rpc("eagle_target", args=("prepare", plan["aux_layer_ids"]))
