"""The batches that everything is measured on."""

from __future__ import annotations

import pytest

from eagle_target.errors import ConfigError
from eagle_target.verify.workload import Workload, random_mapping


@pytest.mark.parametrize(("batch", "pad_ratio"), [(1, 0.0), (8, 0.0), (8, 0.5), (5, 0.3), (2, 0.9)])
def test_a_batch_has_the_pads_and_the_loss_that_were_asked_for(batch: int, pad_ratio: float) -> None:
    workload = Workload(batch=batch, seq=200, pad_ratio=pad_ratio, loss_ratio=0.25)

    for input_ids, attention, loss in workload.make_inputs(100, seed=0):
        assert input_ids.shape == attention.shape == loss.shape == (batch, 200)
        assert int(attention.sum()) == workload.real_tokens
        assert int(loss.sum()) == workload.supervised_tokens
        assert not (loss & (1 - attention)).any()
        assert not loss[:, 0].any()
        assert not (input_ids * (1 - attention)).any()
    assert workload.real_tokens == pytest.approx(batch * 200 * (1 - pad_ratio), rel=0.02)
    assert workload.supervised_tokens == pytest.approx(0.25 * workload.real_tokens, rel=0.02)


def test_batches_of_one_client_differ_and_those_of_another_as_well() -> None:
    workload = Workload(batch=2, seq=16)
    batches = [ids for seed in (0, 1) for ids, _, _ in workload.make_inputs(1000, seed)]

    assert len({tuple(ids.flatten().tolist()) for ids in batches}) == len(batches)


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"seq": 1}, {"loss_ratio": 0.0}, {"loss_ratio": 1.5}, {"pad_ratio": 1.0}, {"pad_ratio": -1}]
)
def test_sizes_that_make_no_batch_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Workload(**wrong)  # type: ignore[arg-type]


def test_a_mapping_is_random_or_everything() -> None:
    assert random_mapping(50, None).is_identity
    assert random_mapping(50, 20).draft_vocab_size == 20
    assert random_mapping(50, 20) == random_mapping(50, 20)
    assert random_mapping(40_000, None).draft_vocab_size == 32_000
    for wrong in (0, 51):
        with pytest.raises(ConfigError, match="1 to 50 ids"):
            random_mapping(50, wrong)
