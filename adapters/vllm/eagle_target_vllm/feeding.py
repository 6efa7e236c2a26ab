"""Runs prompts through vLLM for what its workers see of them; what it generates is thrown away."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import vllm
from vllm import SamplingParams

from eagle_target.errors import AdapterError
from eagle_target_vllm.capture import REQUEST_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm.v1.engine.llm_engine import LLMEngine

POLL_SECONDS = 0.002
# How long after a failure an engine of another process may take to say that it is dead.
DEATH_SECONDS = 2.0


def run_sequences(
    engine: LLMEngine, serial: int, sequences: Sequence[list[int]], *, may_reuse_prefixes: bool = False
) -> None:
    """Run token ids through the engine, all in flight at a time; returns when each has been computed.

    may_reuse_prefixes: whether a token that is in the prefix cache need not be computed.
    """
    names: list[str] = []
    try:
        for index, ids in enumerate(sequences):
            names.append(f"eagle-target-{serial}-{index}")
            engine.add_request(names[-1], _prompt(ids), _parameters(serial, index, may_reuse_prefixes))
        while engine.has_unfinished_requests():
            engine.step()
    except BaseException:
        _abort(engine, names)
        raise


def step_until(engine: LLMEngine, is_complete: Callable[[], bool], *, timeout: float) -> None:
    """Step an engine that has answered, for what it does afterwards; returns when that is done or time is up."""
    deadline = time.monotonic() + timeout
    is_inline = hasattr(engine, "model_executor")
    while not is_complete() and time.monotonic() < deadline:
        if is_inline:
            engine.engine_core.get_output()
        else:
            time.sleep(POLL_SECONDS)


def has_lost_process(engine: LLMEngine, *, patience: float = DEATH_SECONDS) -> bool:
    """Whether an engine misses one of its processes; one that has just failed may take `patience` seconds to know."""
    executor = getattr(engine, "model_executor", None)
    if executor is not None:
        return bool(getattr(executor, "is_failed", False))
    resources = getattr(engine.engine_core, "resources", None)
    deadline = time.monotonic() + patience
    while not getattr(resources, "engine_dead", False) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return bool(getattr(resources, "engine_dead", False))


def check_outcome(outcome: dict[str, Any]) -> None:
    """Refuse what the workers captured where something is missing.

    Raises:
        AdapterError: names what.
    """
    if outcome["problem"]:
        raise AdapterError(f"vLLM {vllm.__version__} gave no hidden states: {outcome['problem']}")
    if outcome["shortfall"]:
        index, captured, length = outcome["shortfall"][0]
        raise AdapterError(
            f"vLLM {vllm.__version__} computed {captured} of the {length} tokens of sequence {index} "
            f"({len(outcome['shortfall'])} sequences are short): give engine_args that change no prompt"
        )


def _prompt(ids: list[int]) -> Any:
    return {"prompt_token_ids": ids}


def _parameters(serial: int, index: int, may_reuse_prefixes: bool) -> SamplingParams:
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        skip_reading_prefix_cache=not may_reuse_prefixes,
        extra_args={REQUEST_KEY: [serial, index]},
    )


def _abort(engine: LLMEngine, names: list[str]) -> None:
    # A dead engine has nothing to abort, and the first error says more than a second would.
    with contextlib.suppress(Exception):
        engine.abort_request(names)
