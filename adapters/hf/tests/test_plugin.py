"""The plugin module: what it registers, and what importing it does not import."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import eagle_target_hf
import pluggy
import pytest
from eagle_target_hf import HFAdapter

from eagle_target.errors import ConfigError
from eagle_target.plugins import hookspecs
from eagle_target.plugins.options import PluginOptions

if TYPE_CHECKING:
    from eagle_target.plugins.adapter import Adapter

CHECK = """
import sys, eagle_target_hf
found = {"torch", "transformers", "accelerate"} & set(sys.modules)
assert not found, found
assert eagle_target_hf.HFAdapter.engine_version()
assert eagle_target_hf.HFAdapter.unusable_reason() is None
found = {"torch", "transformers", "accelerate"} & set(sys.modules)
assert not found, found
"""


def test_importing_the_plugin_imports_no_engine() -> None:
    result = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_registers_the_adapter_through_the_hook() -> None:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(eagle_target_hf)
    manager.check_pending()
    registered: list[type[Adapter]] = []

    manager.hook.register_adapters(register=registered.append)

    assert registered == [HFAdapter]
    assert HFAdapter.name == "hf"


def test_every_public_name_is_there() -> None:
    for name in eagle_target_hf.__all__:
        assert getattr(eagle_target_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eagle_target_hf.no_such_name


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFAdapter, "engine_version", classmethod(lambda cls: None))

    assert HFAdapter.unusable_reason() == "transformers is not installed: pip install eagle-target-hf"


def test_options_of_another_adapter_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes HFOptions, got PluginOptions"):
        HFAdapter.load("somewhere", PluginOptions())
