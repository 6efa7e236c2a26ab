"""Hidden states and logits of the real engine against transformers on the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_sglang import SGLangAdapter, SGLangOptions

from eagle_target.testing.adapter_oracle import HFOracle

from .checkpoints import ARCHITECTURES, LAYERS, save_checkpoint
from .engines import on_this_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.runner import TargetForward, TargetRunner

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]

LENGTHS = (1, 7, 700, 64, 2, 130, 1)
AUX_LAYERS = ((1, 3, 4), (LAYERS - 1, 0, 5))
# Of transformers' two best logits: nearer than this either may win.
TIE = 1e-4


def load(checkpoint: Path, **options: Any) -> TargetRunner:
    return SGLangAdapter.load(str(checkpoint), SGLangOptions(in_process=False, **options))


def sequences(vocab_size: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (length,), generator=draw).tolist() for length in LENGTHS]


def run(runner: TargetRunner, rows: list[list[int]], aux_layer_ids: Sequence[int]) -> TargetForward:
    runner.set_aux_layers(aux_layer_ids)
    return runner.forward_eagle3(torch.tensor([token for row in rows for token in row]), [len(row) for row in rows])


@pytest.mark.parametrize("architecture", on_this_version(ARCHITECTURES))
def test_float32_is_within_5e_5_of_transformers(tmp_path: Path, architecture: str) -> None:
    checkpoint = save_checkpoint(tmp_path, architecture)
    runner, oracle = load(checkpoint), HFOracle(checkpoint)
    try:
        rows = sequences(oracle.vocab_size)
        states = [oracle.run(row) for row in rows]
        logits = torch.cat([state.logits for state in states])
        for aux_layer_ids in AUX_LAYERS:
            forward = run(runner, rows, aux_layer_ids)
            given = runner.compute_logits(forward.last_hidden_states)

            aux = torch.cat([state.aux(aux_layer_ids) for state in states])
            assert float((forward.aux_hidden_states - aux).abs().max()) <= 5e-5
            last = torch.cat([state.last for state in states])
            assert float((forward.last_hidden_states - last).abs().max()) <= 5e-5
            assert float((given - logits).abs().max()) <= 5e-5
            best = logits.topk(2).values
            clear = best[:, 0] - best[:, 1] > TIE
            assert torch.equal(given.argmax(1)[clear], logits.argmax(1)[clear])
    finally:
        runner.close()


@pytest.mark.parametrize("architecture", on_this_version(("llama", "qwen3")))
def test_bfloat16_is_no_further_from_float32_than_transformers_bfloat16(tmp_path: Path, architecture: str) -> None:
    checkpoint = save_checkpoint(tmp_path, architecture, "bfloat16")
    runner, rounded, exact = load(checkpoint), HFOracle(checkpoint), HFOracle(checkpoint)
    exact.model.float()
    try:
        rows = sequences(exact.vocab_size)
        forward = run(runner, rows, AUX_LAYERS[0])
        given = (forward.aux_hidden_states, runner.compute_logits(forward.last_hidden_states))

        wanted, theirs = (
            [(state.aux(AUX_LAYERS[0]), state.logits) for state in map(oracle.run, rows)] for oracle in (exact, rounded)
        )
        for part in (0, 1):
            truth = torch.cat([state[part] for state in wanted])
            ours = (given[part].float() - truth).norm() / truth.norm()
            hf = (torch.cat([state[part] for state in theirs]) - truth).norm() / truth.norm()
            # Both are noise of the same size: a tenth is between two draws of it.
            assert float(ours) <= 1.1 * float(hf)
    finally:
        runner.close()
