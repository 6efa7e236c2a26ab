"""Every command's help, the list of plugins, and what importing the command costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eagle_target.cli.main import cli
from eagle_target.config import ServerConfig

if TYPE_CHECKING:
    from .conftest import Command

COMMANDS = [[], *([name] for name in cli.commands)]
NO_TORCH = """
import sys
from eagle_target.cli.main import cli
from eagle_target.plugins.registry import load_plugins
found = load_plugins()
for origin in [*found.adapters, *found.transports]:
    origin.plugin.unusable_reason(), origin.plugin.options_model
for name in ("torch", "transformers", "starlette", "uvicorn", "safetensors"):
    assert name not in sys.modules, name
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_shown(eagle_target: Command, command: list[str]) -> None:
    result = eagle_target(*command, "-h")

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: python -m eagle_target {' '.join(command)}".rstrip())
    assert not result.stderr


def test_every_setting_of_a_server_is_a_flag_with_its_description(eagle_target: Command) -> None:
    text = " ".join(eagle_target("serve", "--help").stdout.split())

    for name, field in ServerConfig.model_fields.items():
        if name not in ("engine_options", "transport_options", "token"):
            assert f"--{name.replace('_', '-')}".removesuffix("s" if name == "transports" else "") in text
            assert " ".join((field.description or "").split())[:40] in text


def test_the_installed_script_is_the_same_command(eagle_target: Command) -> None:
    script = Path(sys.executable).with_name("eagle-target")

    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)

    assert result.returncode == 0
    assert result.stdout.split()[-1] == eagle_target("--version").stdout.split()[-1] == "0.1.0"


def test_the_command_and_the_plugins_import_no_torch() -> None:
    result = subprocess.run([sys.executable, "-c", NO_TORCH], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_plugins_are_listed_with_what_can_be_installed(eagle_target: Command) -> None:
    result = eagle_target("plugins")
    rows = [line.split() for line in result.stdout.splitlines()]

    assert result.returncode == 0
    assert ["transport", "wire", "-", "eagle-target", "0.1.0", "yes"] in rows
    assert any(row[:2] == ["engine", "hf"] and row[-1] == "yes" for row in rows)
    assert "vllm is not installed: pip install" in result.stdout


def test_options_of_a_plugin_are_described(eagle_target: Command) -> None:
    text = " ".join(eagle_target("plugins", "--options", "hf").stdout.split())

    assert "options of hf" in text
    assert "dtype of the weights; auto takes the checkpoint's." in text
    assert "Literal['auto', 'float32', 'bfloat16', 'float16']" in text


def test_options_of_an_unknown_plugin_suggest_the_nearest(eagle_target: Command) -> None:
    result = eagle_target("plugins", "--options", "wirre")

    assert result.returncode == 1
    assert result.stderr == "error: no engine or transport 'wirre' is installed, did you mean 'wire'?\n"


def test_an_unknown_command_is_an_error(eagle_target: Command) -> None:
    result = eagle_target("serv")

    assert result.returncode == 2
    assert "No such command 'serv'" in result.stderr
