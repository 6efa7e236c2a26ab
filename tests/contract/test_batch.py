"""The batch a trainer gets."""

from __future__ import annotations

import itertools

import pytest
import torch

from eagle_target.contract.batch import Eagle3TargetBatch
from eagle_target.errors import ContractError

FORMS = {
    "logits": torch.zeros(2, 3, 11),
    "target_probs": torch.zeros(2, 3, 5),
    "position_mask": torch.zeros(2, 3, 1, dtype=torch.bool),
}


def batch(**fields: torch.Tensor) -> Eagle3TargetBatch:
    rows = torch.ones(2, 3, dtype=torch.int64)
    return Eagle3TargetBatch(
        aux_hidden_states=torch.zeros(2, 3, 12), input_ids=rows, attention_mask=rows, loss_mask=rows, **fields
    )


@pytest.mark.parametrize(
    "names", [names for size in range(4) for names in itertools.combinations(FORMS, size)], ids="+".join
)
def test_exactly_one_of_two_forms_is_taken(names: tuple[str, ...]) -> None:
    given = {name: FORMS[name] for name in names}
    if names in (("logits",), ("target_probs", "position_mask")):
        assert set(given) < set(batch(**given).tensors())
        return
    with pytest.raises(ContractError, match="either logits or both target_probs and position_mask, got") as refusal:
        batch(**given)
    assert all(name in str(refusal.value).split("got")[1] for name in names or ("neither",))


def test_trainer_inputs_of_probs_have_the_reference_names() -> None:
    made = batch(target_probs=FORMS["target_probs"], position_mask=FORMS["position_mask"])
    inputs = made.to_trainer_inputs()
    assert list(inputs) == [
        "input_ids",
        "attention_mask",
        "loss_mask",
        "aux_hidden_states",
        "target_probs",
        "position_mask",
    ]
    assert inputs["target_probs"] is made.target_probs


def test_trainer_inputs_call_logits_target_logits() -> None:
    made = batch(logits=FORMS["logits"])
    assert made.to_trainer_inputs()["target_logits"] is made.logits
    assert "logits" not in made.to_trainer_inputs()


def test_trainer_inputs_have_packing_and_no_extras() -> None:
    rows = torch.ones(2, 3, dtype=torch.int64)
    made = batch(
        logits=FORMS["logits"],
        position_ids=rows,
        seq_lens=rows,
        doc_remaining=rows,
        target_top_ids=rows.int(),
        target_logsumexp=rows.float(),
    )
    assert {"position_ids", "seq_lens", "doc_remaining"} <= set(made.to_trainer_inputs())
    assert not {"target_top_ids", "target_logsumexp"} & set(made.to_trainer_inputs())
    assert {"target_top_ids", "target_logsumexp"} <= set(made.tensors())


def test_moving_takes_every_field_along() -> None:
    made = batch(target_probs=FORMS["target_probs"], position_mask=FORMS["position_mask"])
    moved = made.to("meta")
    assert set(moved.tensors()) == set(made.tensors())
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert made.input_ids.device.type == "cpu"
    same = made.to(torch.device("cpu"))
    assert same.target_probs is made.target_probs
