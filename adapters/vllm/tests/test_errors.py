"""What the adapter says when vLLM cannot do what was asked."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from eagle_target_vllm import VLLMAdapter, VLLMOptions

from eagle_target.errors import AdapterError, ConfigError
from eagle_target.plugins.options import build_model

from .models import save_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from eagle_target_vllm import VLLMTargetRunner

EAGER: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def runner(checkpoint: Path) -> Iterator[VLLMTargetRunner]:
    loaded = VLLMAdapter.load(str(checkpoint), VLLMOptions(max_model_len=256, **EAGER))
    yield loaded
    loaded.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine_args": {"max_num_batched_token": 9}}, "did you mean 'max_num_batched_tokens'"),
        ({"engine_args": {"pipeline_parallel_size": 2}}, "tensor_parallel_size"),
        ({"engine_args": {"max_model_len": 9}}, "option of its own"),
        ({"engine_args": {"distributed_executor_backend": "ray"}}, "tensor_parallel_size"),
        ({"enable_prefix_caching": True}, "capture=connector"),
        ({"aux_layer_ids": [0, 1, 2]}, "unknown option 'aux_layer_ids'"),
    ],
)
def test_options_that_cannot_be_are_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VLLMAdapter.load(str(checkpoint), build_model(VLLMOptions, options, "options"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine_args": {"kv_cache_dtype": "no_such_dtype"}}, "no_such_dtype"),
        ({"max_model_len": 100_000}, "100000"),
        ({"kv_cache_memory_bytes": 4096}, "kv_cache_memory_bytes"),
        # More than the machine has: the allocator itself refuses.
        ({"kv_cache_memory_bytes": 1 << 46}, "out of memory in loading.*kv_cache_memory_bytes"),
    ],
)
def test_vllms_own_message_is_kept(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        VLLMAdapter.load(str(checkpoint), VLLMOptions.model_validate({**EAGER, **options}))


def test_a_model_without_eagle3_support_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"vLLM .* cannot capture hidden states of a GPT2LMHeadModel"):
        VLLMAdapter.load(str(save_model("gpt2", tmp_path)), VLLMOptions(**EAGER))


def test_nothing_is_captured_before_layers_are_named(runner: VLLMTargetRunner) -> None:
    with pytest.raises(AdapterError, match="set_aux_layers first"):
        runner.forward_eagle3(torch.tensor([1, 2]), [2])


def test_a_prompt_over_the_limit_is_refused_and_the_next_one_runs(runner: VLLMTargetRunner) -> None:
    runner.set_aux_layers((0, 1, 2))
    assert runner.info.max_seq_len == 255

    with pytest.raises(AdapterError, match="256"):
        runner.forward_eagle3(torch.arange(300), [40, 260])

    assert runner.forward_eagle3(torch.arange(255), [255]).last_hidden_states.shape[0] == 255


def test_out_of_memory_names_the_options(runner: VLLMTargetRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.set_aux_layers((0, 1, 2))

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner._engine, "step", step)
    with pytest.raises(AdapterError, match="max_num_batched_tokens"):
        runner.forward_eagle3(torch.arange(9), [9])
    monkeypatch.undo()

    assert runner.forward_eagle3(torch.arange(9), [9]).last_hidden_states.shape[0] == 9


def test_memory_that_really_runs_out_names_the_options(runner: VLLMTargetRunner) -> None:
    runner.set_aux_layers((0, 1, 2))
    lengths = [255] * 800
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (64 << 20), before[1]))
    try:
        with pytest.raises(AdapterError, match=r"out of memory in .*max_num_batched_tokens"):
            runner.forward_eagle3(ids, lengths)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)

    assert runner.forward_eagle3(torch.arange(9), [9]).last_hidden_states.shape[0] == 9


def test_rows_that_are_missing_are_an_error(runner: VLLMTargetRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.set_aux_layers((0, 1, 2))
    monkeypatch.setattr("eagle_target_vllm.capture.CapturedSequence.store", lambda *_: None)

    with pytest.raises(AdapterError, match="computed 0 of the 9 tokens of sequence 0"):
        runner.forward_eagle3(torch.arange(9), [9])
