"""capture=connector on the real engine: compiled, with the prefix cache on, one worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_vllm import VLLMAdapter, VLLMOptions

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.errors import AdapterError
from eagle_target.testing.adapter_oracle import HFOracle, check_batch, padded_input
from eagle_target.testing.tiny import shuffled_mapping

from .models import VOCAB, save_model
from .parity import draw_sequences, run_engine, run_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner

AUX = (0, 3, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def load(checkpoint: Path, aux_layer_ids: Sequence[int] | None = None, **options: object) -> TargetRunner:
    return VLLMAdapter.load(
        str(checkpoint),
        VLLMOptions.model_validate(
            {"capture": "connector", "kv_cache_memory_bytes": 128 << 20, "max_num_batched_tokens": 256, **options}
        ),
        aux_layer_ids,
    )


@pytest.fixture(scope="module")
def compiled(checkpoint: Path) -> Iterator[TargetRunner]:
    runner = load(checkpoint, AUX)
    yield runner
    runner.close()


def test_cached_prefixes_are_captured_too(compiled: TargetRunner, checkpoint: Path) -> None:
    sequences = draw_sequences(VOCAB)
    longer = [torch.cat([sequences[3], sequences[4]]), sequences[5][:100], *sequences]
    expected = run_transformers(checkpoint, sequences, AUX, torch.float32)
    expected_longer = run_transformers(checkpoint, longer, AUX, torch.float32)

    worst = [run_engine(compiled, sequences, AUX).worst(expected) for _ in range(2)]
    worst.append(run_engine(compiled, longer, AUX).worst(expected_longer))

    print("worst absolute difference: computed {:.1e}, from the cache {:.1e}, partly {:.1e}".format(*worst))
    assert max(worst) <= 5e-5


def test_supervision(compiled: TargetRunner, checkpoint: Path) -> None:
    mapping = shuffled_mapping(VOCAB, 300)
    given = padded_input([40, 3, 300, 1], VOCAB)
    backend = RunnerEagle3TargetModel(compiled, AUX)
    backend.set_vocab_mapping(mapping)

    tensors = backend.generate_batch(**given.arguments()).tensors()

    ids = mapping.selected_token_ids.tolist()
    check_batch(tensors, given, HFOracle(checkpoint), aux_layer_ids=AUX, selected_token_ids=ids, tolerance=1e-4)


def test_other_layers_than_those_compiled_in_are_refused(compiled: TargetRunner) -> None:
    with pytest.raises(AdapterError, match="--aux-layer-ids"):
        compiled.set_aux_layers((1, 2, 3))


def test_a_second_engine_in_the_process_is_refused(compiled: TargetRunner, checkpoint: Path) -> None:
    with pytest.raises(AdapterError, match="process=separate"):
        load(checkpoint, enforce_eager=True)
