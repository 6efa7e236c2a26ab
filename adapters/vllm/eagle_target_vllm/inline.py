"""What engines in one process must share: vLLM keeps process groups and the context of a forward in globals."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.engine.llm_engine import LLMEngine

# Held while an inline engine is built, steps or ends: each would see the other's globals.
INLINE_LOCK = threading.RLock()
_running: set[int] = set()


def register(engine: LLMEngine) -> None:
    """Count an inline engine, until `shut_down`."""
    _running.add(id(engine))


def is_anything_running() -> bool:
    """Whether an inline engine is running in this process."""
    return bool(_running)


def shut_down(engine: LLMEngine) -> None:
    """End an inline engine; the process groups go with the last one."""
    with INLINE_LOCK:
        _running.discard(id(engine))
        if _running:
            with _kept_groups():
                engine.engine_core.shutdown()
        else:
            engine.engine_core.shutdown()


@contextmanager
def _kept_groups() -> Iterator[None]:
    # vLLM 0.32: an engine's end destroys the groups that the others of its process use.
    module: Any = core
    destroy = module.cleanup_dist_env_and_memory
    module.cleanup_dist_env_and_memory = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        module.cleanup_dist_env_and_memory = destroy
