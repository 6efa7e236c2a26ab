"""Whether two batches are the same, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eagle_target.contract.batch import Eagle3TargetBatch


def assert_same_batch(given: Eagle3TargetBatch, expected: Eagle3TargetBatch) -> None:
    """Two batches have the same fields, of the same dtypes, shapes and bits, on whatever device.

    Raises:
        AssertionError: they have not; it names the field.
    """
    assert_same_bits(given.tensors(), expected.tensors())


def assert_same_bits(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Two sets of tensors are the same in names, dtypes, shapes and bits.

    Raises:
        AssertionError: they are not; it names the tensor.
    """
    assert {*given} == {*expected}, f"tensors {sorted(given)}, expected {sorted(expected)}"
    for name, wanted in expected.items():
        made = given[name]
        assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape), (
            f"{name} is {made.dtype} {list(made.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
        )
        ours, theirs = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (made, wanted))
        assert torch.equal(ours, theirs), f"{name} has other bits, from byte {int((ours != theirs).nonzero()[0])}"
