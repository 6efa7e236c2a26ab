"""Takes hidden states out of vLLM's model runner as it steps, each row to where it belongs.

hidden = the target's width. A step's rows are those of its requests one after another; a long prompt is spread over
several steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

# Key of `SamplingParams.extra_args` that names the forward and the sequence: vLLM gives requests ids of its own.
REQUEST_KEY = "eagle_target"


@dataclass(slots=True, eq=False)
class CapturedSequence:
    """Where one sequence's rows go, and how many of them are there.

    aux: `[n, 3*hidden]`, None on a rank that gives nothing away. last: `[n, hidden]`.
    """

    aux: torch.Tensor | None
    last: torch.Tensor
    captured: int = 0

    def store(self, start: int, aux: Sequence[torch.Tensor], last: torch.Tensor) -> None:
        """Store `[m, hidden]` rows from `start` on; what lies beyond the prompt is dropped."""
        count = min(len(last), len(self.last) - start)
        if count <= 0:
            return
        rows = slice(start, start + count)
        self.last[rows].copy_(last[:count])
        if self.aux is not None:
            width = last.shape[1]
            for index, layer in enumerate(aux):
                self.aux[rows, index * width : (index + 1) * width].copy_(layer[:count])
        # Rows that were skipped are never made up for by later ones.
        if start <= self.captured:
            self.captured = max(self.captured, start + count)


class ForwardCapture:
    """The sequences of one forward. serial: its number, so that a request given up earlier is not taken for one."""

    def __init__(self, serial: int, sequences: Sequence[CapturedSequence]) -> None:
        self.serial = serial
        self.sequences = sequences
        self.problem: str | None = None

    def find(self, extra_args: dict[str, Any] | None) -> CapturedSequence | None:
        """The sequence that a request stands for; None where it is none of this forward."""
        serial, index = (extra_args or {}).get(REQUEST_KEY, (-1, -1))
        return self.sequences[index] if serial == self.serial else None

    def shortfall(self) -> list[list[int]]:
        """`[sequence, captured rows, its length]` of each that is incomplete."""
        return [
            [index, sequence.captured, len(sequence.last)]
            for index, sequence in enumerate(self.sequences)
            if sequence.captured != len(sequence.last)
        ]


class StepObserver:
    """Sees every step of a model runner from its start until the engine ends.

    stores: whether it takes states, too, or only learns which request stands for which sequence.
    """

    def __init__(self, model_runner: Any, *, stores: bool) -> None:
        self._runner = model_runner
        self._stores = stores
        self._known: dict[str, CapturedSequence] = {}
        self.capture: ForwardCapture | None = None
        execute: Callable[..., Any] = model_runner.execute_model

        @wraps(execute)
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute(scheduler_output, *args, **kwargs)
            if self.capture is not None:
                self._take(self.capture, scheduler_output)
            return result

        model_runner.execute_model = execute_model

    def begin(self, capture: ForwardCapture) -> None:
        """Capture what belongs to a forward from now on."""
        self._known.clear()
        self.capture = capture

    def end(self) -> None:
        """Capture nothing."""
        self._known.clear()
        self.capture = None

    def receive(self, request_id: str, aux: Sequence[torch.Tensor], last: torch.Tensor) -> None:
        """Take `[n, hidden]` states of a whole sequence that came another way."""
        sequence = self._known.get(request_id)
        if sequence is not None:
            sequence.store(0, aux, last)

    def _take(self, capture: ForwardCapture, scheduler_output: Any) -> None:
        try:
            self._store_step(capture, scheduler_output)
        # An error here would leave the engine in the middle of a step: it is told when the forward is asked for.
        except Exception as error:  # noqa: BLE001
            capture.problem = f"{type(error).__name__}: {error}"

    def _store_step(self, capture: ForwardCapture, scheduler_output: Any) -> None:
        starts = dict(self._starts(capture, scheduler_output))
        if not self._stores:
            return
        state = self._runner.execute_model_state
        if state is None or state.hidden_states is None:
            return
        counts = scheduler_output.num_scheduled_tokens
        # vLLM 0.32: the first generation's batch is on the runner, the second's in the state.
        batch = state.input_batch if hasattr(state, "input_batch") else self._runner.input_batch
        offset = 0
        for request_id in batch.req_ids:
            count = counts.get(request_id, 0)
            sequence = self._known.get(request_id)
            if sequence is not None and count:
                rows = slice(offset, offset + count)
                aux = [layer[rows] for layer in state.aux_hidden_states or ()]
                sequence.store(starts[request_id], aux, state.hidden_states[rows])
            offset += count

    def _starts(self, capture: ForwardCapture, scheduler_output: Any) -> Iterator[tuple[str, int]]:
        """Index of the first token that a step computes of each of its requests."""
        for new in scheduler_output.scheduled_new_reqs:
            sequence = capture.find(new.sampling_params.extra_args if new.sampling_params else None)
            if sequence is not None:
                self._known[new.req_id] = sequence
                yield new.req_id, new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
