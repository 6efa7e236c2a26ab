"""The suite of adapters finds the mistakes it is there to find: a good runner passes, each bad one does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_hf import HFAdapter

from eagle_target.contract.runner import TargetRunner
from eagle_target.contract.target import validate_aux_layer_ids
from eagle_target.testing.adapter_oracle import HFOracle, padded_input
from eagle_target.testing.adapter_served import ServedAdapterConformance, ServedCheckpoint
from eagle_target.testing.adapter_suite import LoadedTarget
from eagle_target.testing.adapters import AdapterConformance
from eagle_target.testing.server import loopback_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from eagle_target.contract.runner import DraftHead, TargetForward
    from eagle_target.contract.target import TargetInfo


class Suite(AdapterConformance):
    adapter = HFAdapter


class Good(TargetRunner):
    """A runner in front of a good one."""

    def __init__(self, runner: TargetRunner) -> None:
        self.runner = runner
        self.layers = (0, 1, 2)

    @property
    def info(self) -> TargetInfo:
        return self.runner.info

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.runner.compute_logits(last_hidden_states)

    def input_embedding_weight(self) -> torch.Tensor:
        return self.runner.input_embedding_weight()

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        return self.runner.draft_head(token_ids)

    def close(self) -> None:
        self.runner.close()

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        self.layers = validate_aux_layer_ids(aux_layer_ids, self.runner.info.num_layers)
        self.runner.set_aux_layers(self.layers)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        return self.runner.forward_eagle3(input_ids, seq_lens)


class LayersOffByOne(Good):
    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        super().set_aux_layers([min(layer + 1, self.runner.info.num_layers - 1) for layer in aux_layer_ids])


class LayersAsGiven(Good):
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        low, middle, high = forward.aux_hidden_states.chunk(3, dim=1)
        return replace(forward, aux_hidden_states=torch.cat([high, middle, low], dim=1))


class LastLayerNormed(Good):
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        if self.layers[2] != self.runner.info.num_layers - 1:
            return forward
        aux = forward.aux_hidden_states.clone()
        aux[:, -self.runner.info.hidden_size :] = forward.last_hidden_states
        return replace(forward, aux_hidden_states=aux)


class SequencesLeak(Good):
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        return super().forward_eagle3(input_ids, [sum(seq_lens)])


class Shifted(Good):
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        return replace(forward, last_hidden_states=forward.last_hidden_states.roll(-1, 0))


class HeadScaled(Good):
    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.runner.compute_logits(last_hidden_states) * 1.01


class HeadColumnsAscending(Good):
    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        return self.runner.draft_head(token_ids.sort().values)


class HeadItself(Good):
    def __init__(self, runner: TargetRunner) -> None:
        super().__init__(runner)
        head = runner.draft_head(torch.arange(runner.info.vocab_size))
        assert head is not None
        self.head = head

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        return self.head

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.head.compute_logits(last_hidden_states)


class BuffersReused(Good):
    buffer = torch.empty(0)

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        if len(self.buffer) < len(input_ids):
            self.buffer = torch.empty(4096, forward.aux_hidden_states.shape[1])
        self.buffer[: len(input_ids)] = forward.aux_hidden_states
        return replace(forward, aux_hidden_states=self.buffer[: len(input_ids)])


class NotDeterministic(Good):
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        return replace(forward, aux_hidden_states=forward.aux_hidden_states + 1e-6 * torch.rand(1))


class NotANumber(Good):
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        aux = forward.aux_hidden_states.clone()
        aux[-1, 0] = torch.nan
        return replace(forward, aux_hidden_states=aux)


class HeadPadded(Good):
    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(self.runner.compute_logits(last_hidden_states), (0, 13))


class AcceptsAnyLayer(Good):
    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        self.layers = (0, 1, 2)


MISTAKES = {
    LayersOffByOne: "test_ragged_sequences",
    LayersAsGiven: "test_ragged_sequences",
    LastLayerNormed: "test_last_layer",
    SequencesLeak: "test_ragged_sequences",
    Shifted: "test_padded_rows",
    HeadScaled: "test_ragged_sequences",
    HeadColumnsAscending: "test_draft_head_is_the_engines_columns",
    HeadItself: "test_what_is_handed_out_is_a_copy",
    BuffersReused: "test_a_later_forward_leaves_earlier_tensors_alone",
    NotDeterministic: "test_same_request_gives_the_same_bits",
    NotANumber: "test_one_token",
    HeadPadded: "test_logits_of_some_rows_are_those_rows",
    AcceptsAnyLayer: "test_layers_the_target_has_not_are_refused",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedTarget]:
    folder: Path = Suite.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    loaded = LoadedTarget(folder, Suite.load(folder), HFOracle(folder))
    yield loaded
    loaded.runner.close()


def run(test: str, target: LoadedTarget) -> None:
    """Run one test of the suite on a target."""
    suite = Suite()
    match test:
        case "test_last_layer":
            suite.check_states(target, [9, 4, 1], (1, 4, 7))
        case "test_padded_rows":
            suite.check_rows(target, padded_input([12, 5, 17, 1], target.oracle.vocab_size))
        case "test_layers_the_target_has_not_are_refused":
            suite.test_layers_the_target_has_not_are_refused(target, (0, 1, 99))
        case _:
            getattr(suite, test)(target)


@pytest.mark.parametrize("test", sorted({*MISTAKES.values()}))
def test_a_good_runner_passes(good: LoadedTarget, test: str) -> None:
    run(test, replace(good, runner=Good(good.runner)))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_found(good: LoadedTarget, mistake: type[Good]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(MISTAKES[mistake], replace(good, runner=mistake(good.runner)))


class ServedSuite(ServedAdapterConformance):
    adapter = HFAdapter


@pytest.mark.parametrize("captured", [(0, 4, 7), (0, 4, 6)])
def test_layers_of_a_server_that_are_not_those_it_tells_are_found(
    good: LoadedTarget, captured: tuple[int, int, int]
) -> None:
    inputs = [padded_input([12, 5], good.oracle.vocab_size)]
    with loopback_server(lambda: ServedSuite.load(good.checkpoint), aux_layer_ids=captured) as server:
        served = ServedCheckpoint(good.checkpoint, server.url, good.oracle, (0, 4, 7))
        if captured == served.aux_layer_ids:
            ServedSuite().check_served(served, inputs)
            return
        with pytest.raises(AssertionError, match="aux_hidden_states"):
            ServedSuite().check_served(served, inputs)
