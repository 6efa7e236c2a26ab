"""The plugin without its engine: what importing it imports, its names, its options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import eagle_target_sglang
import pytest
from eagle_target_sglang import SGLangAdapter, SGLangOptions

from eagle_target.errors import ConfigError
from eagle_target.plugins.options import PluginOptions, build_model

CHECK = """
import sys, eagle_target_sglang
eagle_target_sglang.SGLangAdapter.engine_version()
eagle_target_sglang.SGLangAdapter.unusable_reason()
found = {"torch", "transformers", "sglang"} & set(sys.modules)
assert not found, found
"""


def test_importing_the_plugin_imports_no_engine() -> None:
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eagle_target_sglang.no_such_name
    assert eagle_target_sglang.SGLangEagle3TargetModel.__name__ == "SGLangEagle3TargetModel"


def test_without_sglang_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SGLangAdapter, "engine_version", classmethod(lambda cls: None))

    assert SGLangAdapter.unusable_reason() == 'sglang is not installed: pip install "eagle-target-sglang[sglang]"'


def test_options_of_another_adapter_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes SGLangOptions, got PluginOptions"):
        SGLangAdapter.load("somewhere", PluginOptions())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"server_args": {"tp_size": 2}}, "server_args has tp_size, which the adapter sets itself or has as an option"),
        ({"in_process": True, "tp_size": 2}, "in_process=true takes one rank"),
        ({"mem_fraction_static": 1.5}, "mem_fraction_static"),
        ({"tp_sise": 2}, "did you mean 'tp_size'"),
    ],
)
def test_options_that_contradict_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(SGLangOptions, values, "options")


@pytest.mark.parametrize(("values", "expected"), [({}, True), ({"tp_size": 2}, False), ({"in_process": False}, False)])
def test_the_engine_runs_in_this_process_where_it_can(values: dict[str, Any], expected: bool) -> None:
    assert SGLangOptions(**values).runs_in_process is expected
