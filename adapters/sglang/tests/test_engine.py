"""The real engine at its limits, its own capture, its self-check and its ranks."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_sglang import SGLangAdapter, SGLangEagle3TargetModel, SGLangOptions
from eagle_target_sglang.isolated import IsolatedTargetRunner

from eagle_target.errors import AdapterError, ConfigError, ContractError
from eagle_target.testing.adapter_oracle import HFOracle, assert_near, padded_input

from .checkpoints import LAYERS, save_checkpoint
from .engines import OLDEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from eagle_target.contract.runner import TargetForward, TargetRunner

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]

AUX = (1, 3, 4)
# As with 0.5.9 and a newer transformers, the engine then reads another rope_theta than transformers does.
WRONG_ROPE = {"json_model_override_args": '{"rope_theta": 100.0, "rope_parameters": null}'}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> HFOracle:
    return HFOracle(checkpoint)


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Iterator[TargetRunner]:
    """A target with little room: 96 tokens, 3 sequences."""
    runner = load(checkpoint, max_total_tokens=96, max_running_requests=3)
    runner.set_aux_layers(AUX)
    yield runner
    runner.close()


def load(checkpoint: Path, **options: Any) -> TargetRunner:
    return SGLangAdapter.load(str(checkpoint), SGLangOptions(in_process=False, **options))


def rows_of(*lengths: int, seed: int = 0, vocab_size: int = 2048) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=draw).tolist() for length in lengths]


def run(runner: TargetRunner, rows: list[list[int]]) -> TargetForward:
    return runner.forward_eagle3(torch.tensor([token for row in rows for token in row]), [len(row) for row in rows])


def check(runner: TargetRunner, oracle: HFOracle, rows: list[list[int]]) -> None:
    forward = run(runner, rows)
    states = [oracle.run(row) for row in rows]
    assert_near(forward.aux_hidden_states, torch.cat([state.aux(AUX) for state in states]), 1e-4, "aux")
    assert_near(forward.last_hidden_states, torch.cat([state.last for state in states]), 1e-4, "last")
    logits = torch.cat([state.logits for state in states])
    assert_near(runner.compute_logits(forward.last_hidden_states), logits, 1e-4, "logits")


def test_requests_wider_than_the_pools_are_split(small: TargetRunner, oracle: HFOracle) -> None:
    check(small, oracle, rows_of(90, 60, 3, 2, 1, 1, 1, 50))


def test_the_pool_bounds_what_a_server_joins(small: TargetRunner) -> None:
    assert small.token_capacity() == 96


def test_after_a_refusal_the_next_capture_is_exact(small: TargetRunner, oracle: HFOracle) -> None:
    assert small.info.max_seq_len == 96
    with pytest.raises(AdapterError, match="97 tokens, over the KV pool of 96 tokens: raise max_total_tokens"):
        run(small, rows_of(5, 97))

    check(small, oracle, rows_of(96, 5, seed=1))


def test_after_a_failure_within_the_engine_the_pools_are_free(small: TargetRunner, oracle: HFOracle) -> None:
    for _ in range(3):
        with pytest.raises(AdapterError, match="failed in the target's forward"):
            # An id far outside the embedding: the forward fails after the pools were taken.
            run(small, [[*rows_of(80)[0], 10**9]])

    check(small, oracle, rows_of(96, 5, seed=2))


def test_a_batch_over_the_limit_is_refused_before_the_engine(small: TargetRunner) -> None:
    from eagle_target.colocated import RunnerEagle3TargetModel

    target = RunnerEagle3TargetModel(small, AUX, encoding="logits")
    with pytest.raises(ContractError, match="97 tokens, the target takes 96"):
        target.generate_batch(**padded_input([97], 2048).arguments())


def test_the_official_capture_gives_the_same_where_there_is_one(checkpoint: Path, oracle: HFOracle) -> None:
    if SGLangAdapter.engine_version() == OLDEST:
        with pytest.raises(ConfigError, match="has no return_aux_hidden_state_layer_ids: use capture=hook"):
            load(checkpoint, capture="official")
        return
    runner = load(checkpoint, capture="official")
    try:
        runner.set_aux_layers(AUX)
        check(runner, oracle, rows_of(30, 1, 7))
        with pytest.raises(AdapterError, match=r"cannot take layer 7, the last: .* capture=hook"):
            runner.set_aux_layers((0, 1, LAYERS - 1))
    finally:
        runner.close()


def test_a_wrong_engine_does_not_start(checkpoint: Path) -> None:
    with pytest.raises(AdapterError, match=r"SGLang .*transformers .* wrongly: layer 0"):
        load(checkpoint, server_args=WRONG_ROPE)


def test_without_the_self_check_a_wrong_engine_starts(checkpoint: Path, oracle: HFOracle) -> None:
    runner = load(checkpoint, server_args=WRONG_ROPE, self_check=False)
    try:
        runner.set_aux_layers(AUX)
        with pytest.raises(AssertionError, match="aux is off"):
            check(runner, oracle, rows_of(30))
    finally:
        runner.close()


def test_an_argument_that_sglang_has_not_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="has no 'max_total_tokenz'"):
        load(checkpoint, server_args={"max_total_tokenz": 5})


def test_from_pretrained_takes_options_and_server_arguments(checkpoint: Path) -> None:
    given = padded_input([5, 3], 2048)
    with SGLangEagle3TargetModel.from_pretrained(
        checkpoint, AUX, torch.float32, in_process=False, encoding="logits", random_seed=3, max_total_tokens=128
    ) as target:
        assert target.model_info()["max_seq_len"] == 128
        assert target.generate_batch(**given.arguments()).logits is not None


def test_two_ranks_agree_with_transformers_and_a_dead_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its head is padded, and cut into two.
    checkpoint = save_checkpoint(tmp_path, "llama-odd")
    oracle = HFOracle(checkpoint)
    # SGLang wants it said where ranks outnumber NUMA nodes.
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    runner = load(checkpoint, tp_size=2)
    assert isinstance(runner, IsolatedTargetRunner)
    try:
        runner.set_aux_layers(AUX)
        check(runner, oracle, rows_of(30, 1, 7, vocab_size=oracle.vocab_size))
        assert torch.equal(runner.input_embedding_weight(), oracle.input_embedding())
        ids = torch.tensor([2040, 3, 1024, 1023])
        head = runner.draft_head(ids)
        assert head is not None
        assert torch.equal(head.weight, oracle.model.lm_head.weight.detach()[ids])
        os.kill(runner.rank_pids[1], signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(AdapterError, match="ended"):
            run(runner, rows_of(30, vocab_size=oracle.vocab_size))
        assert time.monotonic() - started < 10.0
    finally:
        runner.close()
