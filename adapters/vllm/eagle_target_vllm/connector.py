"""A KV connector over vLLM's `extract_hidden_states` that hands states to the worker that asked for them.

vLLM keeps the states of its prompts in a KV cache group of their own, also of a prefix that it does not compute again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# vLLM gives as many states as it is configured for: three layers, and the last one's output before the final norm.
NUM_STATES = 4


class TargetConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """vLLM's example without its files: finds the states of a finished prompt and gives them to `receiver`.

    receiver: takes a request's id and `[n, NUM_STATES, hidden]`; set by `TargetWorker`.
    """

    receiver: Callable[[str, torch.Tensor], None] | None = None

    def get_finished_count(self) -> Any:
        """Every rank takes its states, so every rank tells when it has."""
        return None

    def wait_for_save(self) -> None:
        """Nothing is written."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Hand over what has finished; its blocks are then free."""
        del finished_req_ids
        if not self.has_connector_metadata():
            return None, None
        metadata: Any = self._get_connector_metadata()
        done = set()
        for pending in metadata.pending_saves:
            if self.receiver is not None:
                self.receiver(pending.req_id, self._read(pending))
            done.add(pending.req_id)
        return done or None, None

    def _read(self, pending: Any) -> torch.Tensor:
        cache: Any = self._kv_cache
        blocks = torch.tensor(pending.block_ids, dtype=torch.long, device=cache.device)
        offsets = torch.arange(self._block_size, device=cache.device)
        slots = (blocks[:, None] * self._block_size + offsets).flatten()
        states: torch.Tensor = extract_from_kv_cache(cache, slots[: len(pending.token_ids)], len(pending.token_ids))
        return states


def state_ids(layer_ids: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """VLLM's ids of the states for three layers, ascending: the layers', the last layer's, and fillers up to four."""
    # vLLM counts what enters a layer: the output of layer i enters layer i + 1.
    wanted = {layer + 1 for layer in layer_ids} | {num_layers}
    spare = (number for number in range(num_layers + 1) if number not in wanted)
    while len(wanted) < NUM_STATES:
        wanted.add(next(spare))
    return tuple(sorted(wanted))


def connector_arguments(layer_ids: tuple[int, ...], num_layers: int) -> dict[str, Any]:
    """What vLLM's engine is told for capture=connector."""
    config = {"eagle_aux_hidden_state_layer_ids": list(state_ids(layer_ids, num_layers))}
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": config},
        },
        "kv_transfer_config": {
            "kv_connector": "TargetConnector",
            "kv_connector_module_path": "eagle_target_vllm.connector",
            "kv_role": "kv_producer",
        },
    }
