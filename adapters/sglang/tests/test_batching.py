"""Splitting requests by what the pools hold."""

from __future__ import annotations

import pytest
from eagle_target_sglang.batching import PoolLimits

from eagle_target.errors import AdapterError


def limits(*, sequences: int = 4, tokens: int = 32, page_size: int = 1, context_length: int = 1000) -> PoolLimits:
    return PoolLimits(sequences=sequences, tokens=tokens, page_size=page_size, context_length=context_length)


def test_what_fits_is_one_group() -> None:
    assert list(limits().split([8, 8, 8, 8])) == [range(4)]


def test_more_tokens_than_the_kv_pool_are_cut() -> None:
    assert list(limits().split([20, 12, 1, 31, 32])) == [range(2), range(2, 4), range(4, 5)]


def test_more_sequences_than_the_request_pool_are_cut() -> None:
    assert list(limits(sequences=2).split([1] * 5)) == [range(2), range(2, 4), range(4, 5)]


def test_a_sequence_takes_whole_pages() -> None:
    assert list(limits(page_size=16).split([1, 1, 1])) == [range(2), range(2, 3)]


@pytest.mark.parametrize(
    ("context_length", "length", "named"), [(1000, 33, "KV pool of 32 tokens"), (16, 17, "context_length of 16")]
)
def test_a_sequence_over_the_limit_is_refused_with_its_name(context_length: int, length: int, named: str) -> None:
    with pytest.raises(AdapterError, match=f"{length} tokens, over .*{named}"):
        list(limits(context_length=context_length).split([1, length]))


def test_the_longest_sequence_is_whole_pages() -> None:
    assert limits(tokens=40, page_size=16).max_seq_len == 32


@pytest.mark.parametrize("seq_lens", [[], [0], [3, -1]])
def test_lengths_that_are_none_are_refused(seq_lens: list[int]) -> None:
    with pytest.raises(AdapterError, match="must be positive"):
        list(limits().split(seq_lens))
