"""What a target is, and how two are told apart."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from eagle_target.contract.target import ServedTarget, TargetInfo

FACTS: dict[str, object] = {
    "model": "some/model",
    "num_layers": 32,
    "hidden_size": 4096,
    "vocab_size": 128256,
    "dtype": "bfloat16",
    "device": "cuda:0",
    "engine": "hf",
    "engine_version": "5.0",
}


def served(aux: tuple[int, int, int] = (1, 15, 28), **changes: object) -> ServedTarget:
    return ServedTarget(info=TargetInfo.model_validate(FACTS | changes), aux_layer_ids=aux)


def changed(field: str, value: object) -> ServedTarget:
    return ServedTarget(info=TargetInfo.model_validate(FACTS | {field: value}), aux_layer_ids=(1, 15, 28))


def test_fingerprint_is_stable() -> None:
    assert served().fingerprint == "037b7a29311e283c"


@pytest.mark.parametrize(("field", "value"), [("device", "cuda:7"), ("max_seq_len", 4096)])
def test_fingerprint_ignores_what_does_not_change_values(field: str, value: object) -> None:
    assert changed(field, value).fingerprint == served().fingerprint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other/model"),
        ("revision", "abc"),
        ("weights", "w1"),
        ("num_layers", 33),
        ("hidden_size", 1),
        ("vocab_size", 1),
        ("dtype", "float16"),
        ("engine", "vllm"),
        ("engine_version", "5.1"),
    ],
)
def test_fingerprint_tells_targets_apart(field: str, value: object) -> None:
    assert changed(field, value).fingerprint != served().fingerprint


def test_known_weights_are_the_same_under_any_name() -> None:
    ours, theirs = served(weights="w1"), served(weights="w1", model="/elsewhere")
    assert ours.fingerprint == theirs.fingerprint
    assert ours.differences(theirs) == []


def test_other_weights_are_another_target_under_any_name() -> None:
    assert served(weights="w1").fingerprint != served(weights="w2").fingerprint
    assert served(weights="w1").differences(served(weights="w2")) == ["weights: w1 != w2"]
    assert served(weights="w1").differences(served(model="b")) == ["model: some/model != b", "weights: w1 != None"]


def test_fingerprint_tells_layers_apart() -> None:
    assert served(aux=(1, 15, 29)).fingerprint != served().fingerprint


def test_fingerprint_survives_json() -> None:
    there = served(revision="abc")
    assert ServedTarget.model_validate_json(there.model_dump_json()).fingerprint == there.fingerprint


def test_same_targets_have_no_differences() -> None:
    assert served().differences(served(device="cuda:3", engine_version="9", max_seq_len=7)) == []


def test_differences_name_field_and_both_values() -> None:
    other = served(aux=(0, 1, 2), revision="abc", dtype="float16")
    assert served().differences(other) == [
        "revision: None != abc",
        "dtype: bfloat16 != float16",
        "aux_layer_ids: (1, 15, 28) != (0, 1, 2)",
    ]


def test_unknown_fact_is_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        TargetInfo.model_validate(FACTS | {"flavour": "vanilla"})
