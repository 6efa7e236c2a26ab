"""Two targets' supervision compared: what counts as different, and what does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target import RunnerEagle3TargetModel
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import ConfigError, ContractError
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from eagle_target.verify.parity import DEFAULTS, Comparison, default_tolerances
from eagle_target.verify.verification import check_comparable, compare_targets, random_rows

if TYPE_CHECKING:
    from eagle_target.contract.batch import Eagle3TargetBatch

VOCAB = 61
EXACT = DEFAULTS["float32"]


def supervise(seed: int = 0, mapping: VocabMapping | None = None) -> Eagle3TargetBatch:
    target = RunnerEagle3TargetModel(EmbeddingRunner(vocab_size=VOCAB, seed=seed), rows="all")
    target.set_vocab_mapping(mapping or VocabMapping.identity(VOCAB))
    input_ids, attention = random_rows(VOCAB, sequences=3, longest=12)
    return target.generate_batch(input_ids, attention, attention)


def compare(ours: Eagle3TargetBatch, theirs: Eagle3TargetBatch, mapping: VocabMapping | None = None) -> Comparison:
    comparison = Comparison(mapping or VocabMapping.identity(VOCAB), tie=EXACT.tie)
    comparison.add(ours, theirs, first_sequence=10)
    return comparison


def past(comparison: Comparison) -> set[str]:
    return {verdict.name.split(",")[0] for verdict in comparison.verdicts(EXACT) if not verdict.is_kept}


def change_top(batch: Eagle3TargetBatch, row: int, position: int, top: int) -> Eagle3TargetBatch:
    assert batch.target_top_ids is not None
    top_ids = batch.target_top_ids.clone()
    top_ids[row, position] = top
    return replace(batch, target_top_ids=top_ids)


def test_the_same_supervision_is_the_same() -> None:
    batch = supervise()
    compared = compare(batch, batch)

    assert not past(compared)
    assert compared.positions == int(batch.attention_mask.sum()) - 3
    assert (compared.kl_max, compared.hidden_max, compared.worst) == (0.0, [0.0] * 3, [])
    assert compared.to_json(EXACT)["within"] is True


def test_another_target_is_past_every_tolerance() -> None:
    assert {name.split(" ")[0] for name in past(compare(supervise(1), supervise(0)))} >= {"hidden", "argmax", "KL"}


def test_a_hidden_state_that_differs_is_found_with_its_place() -> None:
    batch = supervise()
    changed = batch.aux_hidden_states.clone()
    changed[1, 4, 20] += 0.5  # the second layer of three, 16 wide
    compared = compare(replace(batch, aux_hidden_states=changed), batch)

    assert past(compared) == {"hidden states"}
    assert compared.hidden_max == pytest.approx([0.0, 0.5, 0.0], abs=1e-6)
    [worst] = compared.worst
    # The prediction made at token 4 stands at position 3 of the batch.
    assert (worst.sequence, worst.position, worst.token) == (11, 4, int(batch.input_ids[1, 3]))
    assert (worst.kl, worst.argmax) == (0.0, "same")
    assert worst.hidden == pytest.approx(0.5)


def test_pads_do_not_count() -> None:
    batch = supervise()
    changed = batch.aux_hidden_states.clone()
    changed[batch.attention_mask == 0] = math.nan

    assert not past(compare(replace(batch, aux_hidden_states=changed), batch))


def test_kl_is_that_of_the_reference_from_ours() -> None:
    batch = supervise()
    assert batch.target_probs is not None
    flat = torch.full_like(batch.target_probs, 1 / VOCAB)
    compared = compare(replace(batch, target_probs=flat), batch)
    predicted = batch.target_probs.sum(-1) > 0.5
    p = batch.target_probs[predicted].double()
    expected = (p * (p.clamp_min(1e-38).log() + math.log(VOCAB))).sum(-1)

    assert compared.kl_sum == pytest.approx(float(expected.sum()), rel=1e-5)
    assert compared.kl_max == pytest.approx(float(expected.max()), rel=1e-5)
    assert compared.worst[0].kl == pytest.approx(compared.kl_max)


def test_a_value_that_is_no_number_is_never_within() -> None:
    batch = supervise()
    assert batch.target_probs is not None
    broken = batch.target_probs.clone()
    broken[0, 2] = math.nan
    compared = compare(replace(batch, target_probs=broken), batch)

    assert past(compared) == {"KL of the draft's distribution"}
    assert math.isnan(compared.kl_max)
    assert (compared.worst[0].sequence, compared.worst[0].position) == (10, 3)


def test_two_logits_that_are_as_good_as_equal_are_a_tie() -> None:
    batch = supervise()
    assert batch.target_probs is not None
    assert batch.target_top_ids is not None
    top = int(batch.target_top_ids[0, 2])
    other = (top + 1) % VOCAB
    probs = batch.target_probs.clone()
    probs[0, 2, other] = probs[0, 2, top] * (1 - 1e-6)
    tied = replace(batch, target_probs=probs)

    tie = compare(change_top(tied, 0, 2, other), tied)
    clear = compare(change_top(batch, 0, 2, other), batch)

    assert (tie.argmax_differs, tie.ties, tie.worst[0].argmax) == (1, 1, "tie")
    assert not past(tie)
    assert (clear.argmax_differs, clear.ties, clear.worst[0].argmax) == (1, 0, "differs")
    assert past(clear) == {"argmax differs"}


def test_ids_that_the_draft_lacks_cannot_be_told_apart_and_count_as_different() -> None:
    mapping = shuffled_mapping(VOCAB, 20)
    batch = supervise(mapping=mapping)
    assert batch.target_top_ids is not None
    outside = next(i for i in range(VOCAB) if not mapping.selected_token_mask[i] and i != batch.target_top_ids[0, 2])
    compared = compare(change_top(batch, 0, 2, outside), batch, mapping)

    assert (compared.ties, compared.ties_unknown, compared.worst[0].argmax) == (0, 1, "unknown")
    assert past(compared) == {"argmax differs"}


def test_a_mask_that_differs_is_counted() -> None:
    batch = supervise()
    assert batch.position_mask is not None
    mask = batch.position_mask.clone()
    mask[2, 0] = ~mask[2, 0]

    assert past(compare(replace(batch, position_mask=mask), batch)) == {"mask differs"}


def test_batches_of_other_sizes_are_refused() -> None:
    with pytest.raises(ContractError, match="target_probs is"):
        compare(supervise(), supervise(mapping=shuffled_mapping(VOCAB, 20)))


def test_targets_of_another_kind_are_refused() -> None:
    facts = RunnerEagle3TargetModel(EmbeddingRunner()).model_info()

    with pytest.raises(ContractError, match="num_layers: 8 and 9"):
        check_comparable(facts, {**facts, "num_layers": 9})


def test_rows_are_compared_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(VOCAB, sequences=7, longest=10)
    targets = [RunnerEagle3TargetModel(EmbeddingRunner(vocab_size=VOCAB, seed=s), rows="all") for s in (1, 0)]
    mapping = VocabMapping.identity(VOCAB)
    whole = compare_targets(targets[0], targets[1], rows, mapping, tie=EXACT.tie, worst=3)
    monkeypatch.setattr("eagle_target.verify.verification.CHUNK_BYTES", 2 * 4 * VOCAB * 10)
    parts = compare_targets(targets[0], targets[1], rows, mapping, tie=EXACT.tie, worst=3)

    assert parts.positions == whole.positions
    assert parts.kl_sum == pytest.approx(whole.kl_sum)
    assert parts.worst == whole.worst


def test_tolerances_are_those_of_the_coarser_dtype() -> None:
    assert default_tolerances("float32", "float32") == DEFAULTS["float32"]
    assert default_tolerances("bfloat16", "float32") == DEFAULTS["bfloat16"]
    assert default_tolerances("float32", "float16") == DEFAULTS["float16"]
    assert default_tolerances("float32", "float32").changed({"kl": 0.5, "hidden": None}).kl == 0.5


def test_random_rows_need_tokens() -> None:
    with pytest.raises(ConfigError, match="two tokens"):
        random_rows(VOCAB, sequences=1, longest=1)
