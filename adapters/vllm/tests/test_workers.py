"""Two workers of tensor parallelism: the same supervision as transformers, and what happens when one dies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from eagle_target_vllm import VLLMAdapter, VLLMOptions

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.errors import EngineDead
from eagle_target.testing.adapter_oracle import HFOracle, check_batch, padded_input
from eagle_target.testing.tiny import shuffled_mapping

from .models import save_model
from .parity import assert_no_further, draw_sequences, run_engine, run_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner

AUX = (0, 3, 7)
ODD_VOCAB = 2011


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama-odd-vocabulary", tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module", params=["inline", "separate"])
def runner(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[TargetRunner]:
    options: dict[str, Any] = {"tensor_parallel_size": 2} if request.param == "inline" else {"process": "separate"}
    options["enforce_eager"] = True
    loaded = VLLMAdapter.load(
        str(checkpoint),
        VLLMOptions(kv_cache_memory_bytes=64 << 20, max_num_batched_tokens=256, max_num_seqs=64, **options),
        AUX,
    )
    yield loaded
    loaded.close()


def test_chunked_float32_is_transformers(runner: TargetRunner, checkpoint: Path) -> None:
    sequences = draw_sequences(ODD_VOCAB)
    expected = run_transformers(checkpoint, sequences, AUX, torch.float32)

    worst = run_engine(runner, sequences, AUX).worst(expected)

    print(f"worst absolute difference {worst:.1e}")
    assert worst <= 5e-5


def test_the_kv_cache_bounds_what_a_server_joins(runner: TargetRunner) -> None:
    capacity = runner.token_capacity()
    assert capacity is not None
    assert 256 <= capacity < 64 << 20


@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_projection_in_the_workers(runner: TargetRunner, checkpoint: Path, encoding: Any) -> None:
    mapping = shuffled_mapping(ODD_VOCAB, 300)
    given = padded_input([40, 3, 300, 1], ODD_VOCAB)
    backend = RunnerEagle3TargetModel(runner, AUX, encoding=encoding)
    backend.set_vocab_mapping(mapping)

    tensors = backend.generate_batch(**given.arguments()).tensors()

    ids = mapping.selected_token_ids.tolist()
    check_batch(tensors, given, HFOracle(checkpoint), aux_layer_ids=AUX, selected_token_ids=ids, tolerance=1e-4)


def test_draft_head_and_embedding_are_whole(runner: TargetRunner, checkpoint: Path) -> None:
    oracle = HFOracle(checkpoint)
    ids = shuffled_mapping(ODD_VOCAB, 300).selected_token_ids

    head = runner.draft_head(ids)

    assert head is not None
    assert torch.equal(head.weight, oracle.model.lm_head.weight[ids])
    assert torch.equal(runner.input_embedding_weight(), oracle.input_embedding())


def test_bfloat16_of_two_workers_is_no_further_from_float32_than_two_roundings(tmp_path: Path) -> None:
    checkpoint = save_model("llama-odd-vocabulary", tmp_path, dtype=torch.bfloat16)
    sequences = [ids for seed in range(2) for ids in draw_sequences(ODD_VOCAB, seed=seed)]
    options = VLLMOptions(kv_cache_memory_bytes=64 << 20, tensor_parallel_size=2, enforce_eager=True)
    runner = VLLMAdapter.load(str(checkpoint), options, AUX)
    try:
        given = run_engine(runner, sequences, AUX)
    finally:
        runner.close()
    exact = run_transformers(checkpoint, sequences, AUX, torch.float32)
    rounded = run_transformers(checkpoint, sequences, AUX, torch.bfloat16)

    # Each worker rounds its share of a sum, and the sum of the shares is rounded once more.
    assert_no_further(given, rounded, exact, roundings=2)


def test_z_a_dead_worker_is_told_within_seconds(runner: TargetRunner) -> None:
    runner.check_alive()
    runner.set_aux_layers(AUX)
    children = psutil.Process().children(recursive=True)
    workers = [child for child in children if "worker" in child.name().lower()] or children[-1:]
    workers[0].kill()
    started = time.monotonic()

    for _ in range(2):
        with pytest.raises(EngineDead, match="died"):
            runner.forward_eagle3(torch.tensor([1, 2, 3]), [3])

    with pytest.raises(EngineDead, match="died"):
        runner.check_alive()
    assert time.monotonic() - started < 20
