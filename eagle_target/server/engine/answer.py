"""One request's supervision: made part by part in its channel's mapping, handed over, and let go of.

tokens = sum(seq_lens) of the request; rows = the rows of the distribution that it asks for.
"""

from __future__ import annotations

import weakref
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from eagle_target.contract.sinks import PackedTensors, RowStore
from eagle_target.memory import BufferPool, PinnedPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink
    from eagle_target.server.engine.outbox import Claim

# The one tensor that has a row for every token.
AUX = "aux_hidden_states"
IDLE_SECONDS = 10.0


class HostMemory:
    """Memory of answers: used again, and pinned where they come from a CUDA device.

    Args:
        device: where answers come from.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._pool = PinnedPool(device) if self.pinned else BufferPool()

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised CPU tensor, to be kept until copies to it are over."""
        return self._pool.allocate(shape, dtype)

    def trim(self) -> None:
        """Give back what no answer has used for a while."""
        self._pool.trim(IDLE_SECONDS)

    def close(self) -> None:
        """Keep nothing for later."""
        self._pool.close()


class Answer:
    """Supervision of a whole request. Whoever has it releases it: its job, until it is handed over to who asked.

    Args:
        request: what was asked. tensors: the mapping to send; a plain `PackedTensors` is filled with tensors in the
            server's own memory, a transport's own class decides by itself where they lie.
        memory: the server's.

    Attributes:
        tensors: all of it, packed, once it is handed over. timings: where its time went, in seconds by stage.
    """

    def __init__(self, request: SupervisionRequest, tensors: PackedTensors, memory: HostMemory) -> None:
        self.tensors = tensors
        self.timings: dict[str, float] = {}
        self._request = request
        self._memory = memory if type(tensors) is PackedTensors else None
        self._stores: dict[str, RowStore] = {}
        self._starts: tuple[list[int], list[int]] | None = None

    def hand_over(self, claim: Claim | None, timings: dict[str, float]) -> None:
        """Leave it, and its room in the outbox, to whoever asked for it."""
        self.timings = timings
        if claim is not None:
            # A transport keeps the mapping until its client has fetched the tensors, and a caller in this process for
            # as long as it likes. Neither tells when it is through; until then the memory is there, and is counted.
            weakref.finalize(self.tensors, claim.release).atexit = False

    def release(self) -> None:
        """Let go of the tensors; those that nobody else holds are gone. Safe to call twice."""
        self.tensors = PackedTensors()
        self._stores = {}

    def sink(self, sequences: Sequence[int], *, is_shared: bool) -> Sink:
        """Where the supervision of some sequences, in ascending order, goes.

        is_shared: whether the tensors put into it may be parts of what other requests' are parts of, too. Those are
        copied: a client that is slow would keep everybody's memory.
        """
        if len(sequences) == len(self._request.seq_lens):
            return _WholeSink(self, is_shared=is_shared)
        return _PartSink(self, sequences)

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return a store for all rows of a tensor."""
        if self._memory is None:
            return self.tensors.allocate(name, shape, dtype)
        tensor = self._memory.allocate(shape, dtype)
        self.tensors.put(name, tensor)
        return RowStore(tensor, non_blocking=self._memory.pinned)

    def put(self, name: str, rows: torch.Tensor, *, is_shared: bool) -> None:
        """Take all rows of a tensor, by reference where nobody else's are in the same memory."""
        if self._memory is None or not (is_shared or rows.device.type != "cpu"):
            self.tensors.put(name, rows)
        else:
            self.allocate(name, rows.shape, rows.dtype).write(0, rows)

    def store(self, name: str, row_shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """The store for all rows of a tensor, made at the first call."""
        if name not in self._stores:
            self._stores[name] = self.allocate(name, (self._row_starts(name)[-1], *row_shape), dtype)
        return self._stores[name]

    def positions(self, name: str, sequences: Sequence[int]) -> torch.Tensor:
        """int64 rows of some sequences in a tensor of the answer."""
        starts = self._row_starts(name)
        return torch.cat([torch.arange(starts[index], starts[index + 1]) for index in sequences])

    def _row_starts(self, name: str) -> list[int]:
        """Where each sequence's rows of a tensor begin, and where the last one's end."""
        if self._starts is None:
            tokens = [0, *accumulate(self._request.seq_lens)]
            before = torch.cat([torch.zeros(1, dtype=torch.int64), self._request.row_mask.cumsum(0)])
            self._starts = tokens, before[torch.tensor(tokens)].tolist()
        return self._starts[0 if name == AUX else 1]


class _WholeSink:
    """Takes all of a request's supervision."""

    def __init__(self, answer: Answer, *, is_shared: bool) -> None:
        self._answer = answer
        self._is_shared = is_shared

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        return self._answer.allocate(name, shape, dtype)

    def put(self, name: str, rows: torch.Tensor) -> None:
        self._answer.put(name, rows, is_shared=self._is_shared)


class _PartSink:
    """Takes the supervision of some sequences, between that of others."""

    def __init__(self, answer: Answer, sequences: Sequence[int]) -> None:
        self._answer = answer
        self._sequences = sequences

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        whole = self._answer.store(name, shape[1:], dtype)
        return RowStore(whole.out, self._answer.positions(name, self._sequences), whole.non_blocking)

    def put(self, name: str, rows: torch.Tensor) -> None:
        self.allocate(name, rows.shape, rows.dtype).write(0, rows)


class DeferredSink:
    """Takes tensors by reference now and copies, if there is anything to copy, when it is told to."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._later: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the store to write to."""
        return self._sink.allocate(name, shape, dtype)

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Keep a tensor."""
        self._later[name] = rows

    def flush(self) -> list[torch.Tensor]:
        """Hand on what was kept; returns it, to be kept on until copies of it are over."""
        handed, self._later = self._later, {}
        for name, rows in handed.items():
            self._sink.put(name, rows)
        return [*handed.values()]
