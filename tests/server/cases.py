"""Runners that wait or fail on demand, requests, and what their answers must be."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.sinks import PackedTensors
from eagle_target.server.engine.server import TargetModelServer
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from eagle_target.contract.request import Encoding
    from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.server.engine.answer import Answer

VOCAB_SIZE = 211
POISON = 13
ENGINE_THREAD = "eagle-target-engine"
PATIENCE_SECONDS = 30.0


class TestRunner(EmbeddingRunner):
    """A runner whose forwards wait for `gate`, and fail on token POISON.

    Attributes:
        entered: how many forwards began. threads: names of the threads that called it.
    """

    __test__ = False

    def __init__(self, *, poison: type[BaseException] = RuntimeError, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = 0
        self.threads: set[str] = set()
        self._poison = poison

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        self.threads.add(threading.current_thread().name)
        self.entered += 1
        assert self.gate.wait(PATIENCE_SECONDS), "the test never opened the gate"
        if bool((input_ids == POISON).any()):
            raise self._poison("a poisonous token")
        return super().forward_eagle3(input_ids, seq_lens)

    def input_embedding_weight(self) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        return super().input_embedding_weight()

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        self.threads.add(threading.current_thread().name)
        return super().draft_head(token_ids)


class HeadRunner(TestRunner):
    """A runner whose head waits for `head_gate`; its call number n raises `head_errors[n]`."""

    __test__ = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head_gate = threading.Event()
        self.head_gate.set()
        self.head_errors: dict[int, BaseException] = {}
        self.projecting = 0
        self.head_threads: set[str] = set()

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        self.head_threads.add(threading.current_thread().name)
        number = self.projecting = self.projecting + 1
        assert self.head_gate.wait(30), "the test never opened the gate"
        if number in self.head_errors:
            raise self.head_errors[number]
        return super().compute_logits(last_hidden_states)


def wait_until(holds: Callable[[], object], what: str = "it", seconds: float = PATIENCE_SECONDS) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.005)


def mapping_of(seed: int = 0, draft_vocab_size: int = 37) -> VocabMapping:
    return shuffled_mapping(VOCAB_SIZE, draft_vocab_size, seed=seed)


def request_of(
    seq_lens: Sequence[int],
    *,
    seed: int = 0,
    mapping: VocabMapping | None = None,
    encoding: Encoding = "probs",
    poisonous: bool = False,
) -> SupervisionRequest:
    """A request with random ids; about half of the rows are wanted."""
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(seq_lens)
    input_ids = torch.randint(POISON + 1, VOCAB_SIZE, (tokens,), generator=draw)
    if poisonous:
        input_ids[-1] = POISON
    return SupervisionRequest(
        input_ids=input_ids,
        seq_lens=tuple(seq_lens),
        row_mask=torch.rand(tokens, generator=draw) < 0.5,
        encoding=encoding,
        mapping=mapping_of() if mapping is None else mapping,
    )


def expected_of(request: SupervisionRequest) -> PackedTensors:
    """The answer, made without a server."""
    tensors = PackedTensors()
    compute_supervision(EmbeddingRunner(), request, tensors)
    return tensors


assert_same_tensors = assert_same_bits


@contextlib.contextmanager
def engine(load: Callable[[], TargetRunner], *, state: str = "ready", **options: Any) -> Iterator[TargetModelServer]:
    """A server without HTTP, loaded."""
    server = TargetModelServer(load, **options)
    server.start()
    try:
        wait_until(lambda: server.state == state, f"state {state}")
        yield server
    finally:
        server.close()
        assert ENGINE_THREAD not in {thread.name for thread in threading.enumerate()}


@contextlib.contextmanager
def held(server: TargetModelServer, runner: TestRunner) -> Iterator[Future[Answer]]:
    """Keep the engine in a forward while the block queues requests."""
    runner.gate.clear()
    before = runner.entered
    blocker = server.submit(request_of([3]))
    try:
        wait_until(lambda: runner.entered > before, "the forward")
        yield blocker
    finally:
        runner.gate.set()
