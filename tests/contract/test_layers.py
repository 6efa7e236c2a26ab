"""Which decoder layers are captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_target.contract.target import default_eagle3_aux_layer_ids, validate_aux_layer_ids
from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(7, (1, 2, 3)), (8, (1, 3, 4)), (32, (1, 15, 28)), (36, (1, 17, 32)), (61, (1, 29, 57))],
)
def test_default_is_low_middle_high(num_layers: int, expected: tuple[int, int, int]) -> None:
    assert default_eagle3_aux_layer_ids(num_layers) == expected
    assert validate_aux_layer_ids(None, num_layers) == expected


def test_default_is_three_distinct_layers_ascending() -> None:
    for num_layers in range(7, 130):
        low, middle, high = default_eagle3_aux_layer_ids(num_layers)
        assert 0 <= low < middle < high < num_layers, num_layers


def test_shallow_target_has_no_default_and_is_told_to_name_layers() -> None:
    for num_layers in range(7):
        with pytest.raises(ContractError, match=rf"target of {num_layers} layers is too shallow.*name three distinct"):
            default_eagle3_aux_layer_ids(num_layers)


def test_given_layers_are_ascending_afterwards() -> None:
    assert validate_aux_layer_ids([5, 0, 2], 6) == (0, 2, 5)
    assert validate_aux_layer_ids((0, 1, 2), 3) == (0, 1, 2)


@pytest.mark.parametrize("ids", [[], [1, 2], [1, 1, 2], [0, 1, 2, 3]])
def test_other_than_three_distinct_layers_is_refused(ids: Sequence[int]) -> None:
    with pytest.raises(ContractError, match=rf"three distinct layers, got \[{', '.join(map(str, ids))}\]"):
        validate_aux_layer_ids(ids, 8)


@pytest.mark.parametrize(("ids", "wrong"), [([0, 1, 8], 8), ([-1, 1, 2], -1)])
def test_layer_the_target_has_not_is_refused(ids: Sequence[int], wrong: int) -> None:
    with pytest.raises(ContractError, match=rf"has {wrong}, but the target has layers 0 to 7"):
        validate_aux_layer_ids(ids, 8)
