"""Which target tokens the draft can emit, and in what order."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import ContractError, VocabMappingError
from eagle_target.testing.tiny import shuffled_mapping

UNORDERED = [7, 2, 9, 0]


def mapping(ids: list[int], vocab_size: int = 11) -> VocabMapping:
    return VocabMapping.from_ids(torch.tensor(ids), vocab_size)


def test_ids_and_mask_are_kept_in_the_trainers_order() -> None:
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[0, 2, 7, 9]] = True
    made = VocabMapping(torch.tensor(UNORDERED), mask)
    assert made.selected_token_ids.tolist() == UNORDERED
    assert (made.vocab_size, made.draft_vocab_size) == (11, 4)
    assert made == mapping(UNORDERED)
    assert repr(made) == f"VocabMapping(draft 4 of 11, sha256 {made.sha256[:12]})"


def test_interchange_offsets_are_id_minus_index() -> None:
    made = mapping(UNORDERED)
    assert made.d2t.tolist() == [7, 1, 7, -3]
    assert made.t2d.nonzero().flatten().tolist() == [0, 2, 7, 9]


@given(st.permutations(range(13)), st.integers(1, 13))
def test_interchange_round_trips_in_any_order(order: list[int], size: int) -> None:
    made = mapping(order[:size], 13)
    for offsets, mask in [(made.d2t, made.t2d), (made.d2t.int(), made.t2d.to(torch.uint8))]:
        again = VocabMapping.from_d2t_t2d(offsets, mask)
        assert again.selected_token_ids.tolist() == order[:size]
        assert again == made


@pytest.mark.parametrize(
    "d2t", [torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.int64)]
)
def test_interchange_offsets_must_be_integers(d2t: torch.Tensor) -> None:
    with pytest.raises(VocabMappingError, match="d2t must be a vector of integers, got"):
        VocabMapping.from_d2t_t2d(d2t, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), r"torch\.int32 \[2\]"),
        (torch.tensor([1.0]), r"torch\.float32 \[1\]"),
        (torch.tensor([[1]]), r"torch\.int64 \[1, 1\]"),
        (torch.tensor(3), r"torch\.int64 \[\]"),
        (torch.empty(0, dtype=torch.int64), r"torch\.int64 \[0\]"),
        (torch.tensor([3, 11]), "has 11, but the target's ids are 0 to 10"),
        (torch.tensor([3, -1]), "has -1, but the target's ids are 0 to 10"),
        (torch.tensor([3, 5, 3]), "has 3 more than once"),
    ],
)
def test_bad_ids_are_refused_with_their_value(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(VocabMappingError, match=message):
        VocabMapping.from_ids(ids, 11)
    with pytest.raises(VocabMappingError, match=message):
        VocabMapping(ids, torch.ones(11, dtype=torch.bool))


def test_bad_mask_is_refused() -> None:
    with pytest.raises(VocabMappingError, match=r"must be a bool vector, got torch\.uint8 \[11\]"):
        VocabMapping(torch.tensor([1]), torch.ones(11, dtype=torch.uint8))
    with pytest.raises(VocabMappingError, match=r"must be a bool vector, got torch\.bool \[1, 11\]"):
        VocabMapping(torch.tensor([1]), torch.ones(1, 11, dtype=torch.bool))


def test_mask_that_disagrees_is_refused_with_the_first_id() -> None:
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[2, 4, 5]] = True
    with pytest.raises(VocabMappingError, match="on 3 target ids, first 3"):
        VocabMapping(torch.tensor([2, 3]), mask)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(VocabMappingError, match="selected_token_ids is on cpu and selected_token_mask on meta"):
        VocabMapping(torch.tensor([1]), torch.ones(11, dtype=torch.bool, device="meta"))


def test_mapping_errors_are_contract_errors() -> None:
    assert issubclass(VocabMappingError, ContractError)
    assert issubclass(ContractError, ValueError)


def test_hash_is_stable_and_as_documented() -> None:
    content = b"eagle-target/vocab-mapping/1" + struct.pack("<Q", 11) + struct.pack("<4q", *UNORDERED)
    assert mapping(UNORDERED).sha256 == hashlib.sha256(content).hexdigest()
    assert mapping(UNORDERED).sha256 == "bd9604f5b35b504ff8bb166dc9f4a40f2f21c79e3676514a09713628f8e6ad34"


def test_hash_differs_with_order_content_and_vocabulary() -> None:
    hashes = {mapping(UNORDERED).sha256, mapping(sorted(UNORDERED)).sha256, mapping([7, 2, 9, 1]).sha256}
    hashes.add(mapping(UNORDERED, 12).sha256)
    assert len(hashes) == 4


def test_equal_content_is_equal_and_hashes_equal() -> None:
    assert mapping(UNORDERED) == mapping(list(UNORDERED))
    assert len({mapping(UNORDERED), mapping(list(UNORDERED)), mapping(sorted(UNORDERED))}) == 2
    assert mapping(UNORDERED) != "another kind of thing"


def test_content_stays_when_the_callers_tensors_change() -> None:
    ids, mask = mapping(UNORDERED).selected_token_ids, mapping(UNORDERED).selected_token_mask
    made = [VocabMapping(ids, mask), VocabMapping.from_ids(ids, 11)]
    ids[0] = 10
    mask.fill_(value=True)
    for one in made:
        assert one.selected_token_ids.tolist() == UNORDERED
        assert one.selected_token_mask.nonzero().flatten().tolist() == sorted(UNORDERED)
        assert one == mapping(UNORDERED)


def test_moving_to_its_own_device_is_free() -> None:
    made = mapping(UNORDERED)
    assert made.to("cpu") is made


def test_identity_is_recognised() -> None:
    assert VocabMapping.identity(5).is_identity
    assert VocabMapping.identity(5).selected_token_ids.tolist() == [0, 1, 2, 3, 4]
    assert not mapping([1, 0, 2], 3).is_identity
    assert not mapping([0, 1, 2], 4).is_identity


def test_another_targets_vocabulary_is_refused() -> None:
    mapping(UNORDERED).check_target(11)
    with pytest.raises(VocabMappingError, match=r"vocabulary of 11, the target's has 12.*vocab_size=12"):
        mapping(UNORDERED).check_target(12)


def test_counts_give_the_most_frequent_first() -> None:
    made = VocabMapping.from_counts(torch.tensor([5, 0, 9, 7, 1]), 3)
    assert made.selected_token_ids.tolist() == [2, 3, 0]
    assert made.vocab_size == 5


def test_counts_ties_go_to_the_lower_id() -> None:
    made = VocabMapping.from_counts(torch.tensor([1, 4, 4, 1, 4, 0, 0]), 6)
    assert made.selected_token_ids.tolist() == [1, 2, 4, 0, 3, 5]


def test_counts_always_take_special_ids() -> None:
    counts = torch.tensor([5, 0, 9, 7, 1, 0])
    made = VocabMapping.from_counts(counts, 4, special_ids=[5, 1, 2, 5])
    assert made.selected_token_ids.tolist() == [2, 3, 1, 5]
    assert VocabMapping.from_counts(counts, 2, special_ids=(1, 5)).selected_token_ids.tolist() == [1, 5]


def test_counts_can_be_ordered_by_target_id() -> None:
    made = VocabMapping.from_counts(torch.tensor([5, 0, 9, 7, 1]), 3, special_ids=[1], ascending=True)
    assert made.selected_token_ids.tolist() == [1, 2, 3]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.data())
def test_counts_agree_with_sorting_in_python(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    special = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=size))
    ascending = data.draw(st.booleans())
    ranked = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    others = [token for token in ranked if token not in special][: size - len(special)]
    chosen = [token for token in ranked if token in special or token in others]
    made = VocabMapping.from_counts(torch.tensor(counts), size, special_ids=special, ascending=ascending)
    assert made.selected_token_ids.tolist() == (sorted(chosen) if ascending else chosen)


@pytest.mark.parametrize(
    ("size", "special", "message"),
    [
        (0, [], "draft_vocab_size must be 1 to 5, got 0"),
        (6, [], "draft_vocab_size must be 1 to 5, got 6"),
        (2, [0, 5], r"special ids must be 0 to 4, got \[0, 5\]"),
        (2, [-1], r"special ids must be 0 to 4, got \[-1\]"),
        (2, [0, 1, 2], "3 special ids do not fit a draft vocabulary of 2"),
    ],
)
def test_counts_that_cannot_be_met_are_refused(size: int, special: list[int], message: str) -> None:
    with pytest.raises(VocabMappingError, match=message):
        VocabMapping.from_counts(torch.ones(5, dtype=torch.int64), size, special_ids=special)


def test_coverage_is_the_share_of_counted_tokens() -> None:
    assert mapping([0, 2], 4).coverage(torch.tensor([3, 5, 1, 1])) == pytest.approx(0.4)
    assert VocabMapping.identity(4).coverage(torch.tensor([3, 5, 1, 1])) == 1.0
    assert mapping([0, 2], 4).coverage(torch.zeros(4, dtype=torch.int64)) == 0.0


def test_shuffled_mapping_does_not_ascend_and_is_reproducible() -> None:
    for size in (2, 3, 40, 211):
        made = shuffled_mapping(211, size)
        assert made.draft_vocab_size == size
        assert bool((made.selected_token_ids.diff() < 0).any())
        assert made == shuffled_mapping(211, size)
    assert shuffled_mapping(211, 40) != shuffled_mapping(211, 40, seed=1)
    with pytest.raises(ContractError, match=r"at least 2 .* got 1"):
        shuffled_mapping(211, 1)
