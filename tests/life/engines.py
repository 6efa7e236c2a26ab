"""A target whose engine is another process, which a test can kill."""

from __future__ import annotations

import multiprocessing
import threading
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.contract.runner import TargetForward, TargetRunner
from eagle_target.errors import EngineDead
from eagle_target.testing.tiny import EmbeddingRunner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from eagle_target.contract.runner import DraftHead
    from eagle_target.contract.target import TargetInfo

# Forked from a process that has imported torch already.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def _work(pipe: Connection, delay: float) -> None:
    """The engine: does what it is told until nobody is there."""
    torch.set_num_threads(1)
    runner = EmbeddingRunner(delay=delay)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(_Engine, method)(runner, *arguments))


class _Engine:
    """What the engine can do; arrays, since tensors would be sent as shared memory."""

    @staticmethod
    def set_aux_layers(runner: EmbeddingRunner, layers: list[int]) -> None:
        runner.set_aux_layers(layers)

    @staticmethod
    def forward(runner: EmbeddingRunner, ids: Any, seq_lens: list[int]) -> tuple[Any, Any]:
        forward = runner.forward_eagle3(torch.from_numpy(ids), seq_lens)
        return forward.aux_hidden_states.numpy(), forward.last_hidden_states.numpy()

    @staticmethod
    def logits(runner: EmbeddingRunner, states: Any) -> Any:
        return runner.compute_logits(torch.from_numpy(states)).numpy()


class ChildRunner(TargetRunner):
    """A `TargetRunner` over an `EmbeddingRunner` in a process of its own."""

    def __init__(self, delay: float = 0.0) -> None:
        self._plain = EmbeddingRunner()
        self._pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_work, args=(theirs, delay), daemon=True)
        self.process.start()
        theirs.close()
        self._lock = threading.Lock()

    @property
    def info(self) -> TargetInfo:
        return self._plain.info

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        self._call("set_aux_layers", list(aux_layer_ids))

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        aux, last = self._call("forward", input_ids.numpy(), list(seq_lens))
        return TargetForward(aux_hidden_states=torch.from_numpy(aux), last_hidden_states=torch.from_numpy(last))

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._call("logits", last_hidden_states.numpy()))

    def input_embedding_weight(self) -> torch.Tensor:
        return self._plain.input_embedding_weight()

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        return self._plain.draft_head(token_ids)

    def close(self) -> None:
        self._pipe.close()
        self.process.kill()
        self.process.join()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            with self._lock:
                self._pipe.send((method, arguments))
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineDead(f"the engine's process ended with {self.process.exitcode}") from error
