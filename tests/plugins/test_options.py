"""Options of plugins."""

from __future__ import annotations

import pytest
from pydantic import Field

from eagle_target.errors import ConfigError
from eagle_target.plugins.options import PluginOptions, build_model, nearest_name, parse_assignments, parse_value


class Inner(PluginOptions):
    depth: int = Field(default=1, description="How deep.")


class Options(PluginOptions):
    memory_fraction: float = Field(default=0.9, description="Share.", gt=0, le=1)
    revision: str | None = Field(default=None, description="Revision.")
    model: str = Field(description="Needed.")
    inner: Inner = Field(default_factory=Inner, description="More.")


def test_values_are_what_they_look_like() -> None:
    given = ["a=true", "b=3", "c=[1, 2]", "d=text", "e=", "f=x=y", 'g={"k": 1}', " h =0.5", 'i="3"', "j=null"]
    assert parse_assignments(given, "-o") == {
        "a": True,
        "b": 3,
        "c": [1, 2],
        "d": "text",
        "e": None,
        "f": "x=y",
        "g": {"k": 1},
        "h": 0.5,
        "i": "3",
        "j": None,
    }


def test_the_last_of_two_wins() -> None:
    assert parse_assignments(["a=1", "a=2"], "-o") == {"a": 2}


@pytest.mark.parametrize("assignment", ["novalue", "=3", "  =3", ""])
def test_what_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=f"-o '{assignment}' is not of the form key=value"):
        parse_assignments([assignment], "-o")


@pytest.mark.parametrize("text", ["[1, 2", "{a:", "'open", "a: b: c", "2024-10-01", "1:30", "0123", "yes"])
def test_what_is_no_json_is_text(text: str) -> None:
    assert parse_value(text) == text


def test_a_number_can_be_a_name() -> None:
    assert build_model(Options, parse_assignments(["model=m", "revision=1234567"], "-o"), "x").revision == "1234567"


def test_model_is_built_and_frozen() -> None:
    built = build_model(Options, {"model": "m", "inner": {"depth": 2}}, "adapter 'x'")
    assert (built.model, built.memory_fraction, built.inner.depth) == ("m", 0.9, 2)


def test_every_wrong_value_is_named() -> None:
    values = {"memory_fraction": 2, "revison": "main", "inner": {"depht": 1, "depth": "deep"}}
    with pytest.raises(ConfigError) as refusal:
        build_model(Options, values, "adapter 'x'")
    message = str(refusal.value)
    assert message.startswith("adapter 'x': ")
    assert "'memory_fraction': Input should be less than or equal to 1, got 2" in message
    assert "'model' is required" in message
    assert "unknown option 'revison', did you mean 'revision'?" in message
    assert "unknown option 'inner.depht', did you mean 'depth'?" in message
    assert "'inner.depth': " in message
    assert "got 'deep'" in message


def test_nearest_name_or_all_names() -> None:
    assert nearest_name("vlm", ["vllm", "sglang", "hf"]) == "did you mean 'vllm'?"
    assert nearest_name("zzz", ["vllm", "sglang", "hf"]) == "known: hf, sglang, vllm"
