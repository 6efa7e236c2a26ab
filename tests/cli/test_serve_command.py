"""`eagle-target serve`: settings, errors without tracebacks, and a real server."""

from __future__ import annotations

import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest
import yaml

from eagle_target.testing.server import server_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Command


def test_printed_settings_load_back_to_the_same(eagle_target: Command, tmp_path: Path) -> None:
    flags = ["--model", "some/model", "--port", "0", "-o", "dtype=float32", "-o", "revision=1.10"]
    flags += ["--transport", "wire,inprocess", "--aux-layer-ids", "3,0,5", "--port-file", str(tmp_path / "port")]
    printed = eagle_target("serve", *flags, "--print-config")
    path = tmp_path / "settings.yaml"
    path.write_text(printed.stdout)

    again = eagle_target("serve", "--config", str(path), "--print-config")

    assert printed.returncode == 0, printed.stderr
    assert again.stdout == printed.stdout
    settings = yaml.safe_load(printed.stdout)
    assert settings["engine_options"]["dtype"] == "float32"
    assert settings["engine_options"]["revision"] == "1.10"
    assert settings["engine_options"]["trust_remote_code"] is False
    assert (settings["transports"], settings["aux_layer_ids"]) == (["wire", "inprocess"], [3, 0, 5])


def test_flags_win_over_the_environment_and_that_over_the_file(eagle_target: Command, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("model: file\nmax_queue: 1\nmax_mappings: 1\nengine_options: {dtype: float16, revision: file}\n")
    environment = {"EAGLE_TARGET_MAX_QUEUE": "2", "EAGLE_TARGET_MAX_MAPPINGS": "2"}
    flags = ["--config", str(path), "--max-queue", "3", "-o", "dtype=bfloat16", "--print-config"]

    settings = yaml.safe_load(eagle_target("serve", *flags, environment=environment).stdout)

    assert (settings["model"], settings["max_mappings"], settings["max_queue"]) == ("file", 2, 3)
    assert settings["engine_options"]["dtype"] == "bfloat16"
    assert settings["engine_options"]["revision"] == "file"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "'model' is required"),
        (["--model", "m", "--engine", "nope"], "there is no adapter 'nope'"),
        (["--model", "m", "--engine", "vllm"], "vllm is not installed: pip install"),
        (["--model", "m", "-o", "dtyp=float32"], "unknown option 'dtyp', did you mean 'dtype'?"),
        (["--model", "m", "-o", "dtype=int4"], "'dtype'"),
        (["--model", "m", "-o", "dtype"], "-o 'dtype' is not of the form key=value"),
        (["--model", "m", "-t", "wire"], "-t 'wire' is not of the form key=value"),
        (["--model", "m", "-t", "wire=3"], "NAME.KEY=VALUE is expected"),
        (["--model", "m", "--transport", "wire", "-t", "wire.x=3"], "unknown option 'x'"),
        (["--model", "m", "--transport", "nope"], "there is no transport 'nope'"),
        (["--model", "m", "-t", "nope.x=3"], "transport_options for ['nope']"),
        (["--model", "m", "--config", "/absent.yaml"], "cannot read the settings file /absent.yaml"),
        (["--model", "m", "--aux-layer-ids", "1,2"], "aux_layer_ids"),
        (["--model", "m", "--host", "256.1.1.1", "--insecure"], "cannot listen on 256.1.1.1"),
    ],
)
def test_wrong_settings_end_it_with_one_line(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused("serve", *arguments)


def test_an_error_has_no_traceback(eagle_target: Command) -> None:
    result = eagle_target("serve")

    assert result.returncode == 1
    assert result.stderr == "error: server settings: 'model' is required\n"


def test_a_flag_of_the_wrong_kind_is_a_usage_error(eagle_target: Command) -> None:
    result = eagle_target("serve", "--model", "m", "--port", "many")

    assert result.returncode == 2
    assert "'many' is not a valid integer" in result.stderr


def test_debug_shows_the_traceback(eagle_target: Command) -> None:
    result = eagle_target("--debug", "serve")

    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "eagle_target.errors.ConfigError: " in result.stderr


def test_a_port_in_use_is_named(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        message = refused("serve", "--model", "m", "--port", str(port))

    assert message == f"error: cannot listen on 127.0.0.1:{port}: Address already in use"


def test_a_port_file_that_cannot_be_written_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "no-folder" / "port"

    assert f"cannot write port_file {path}" in refused("serve", "--model", "m", "--port", "0", "--port-file", str(path))


def test_a_model_that_is_not_there_ends_it_with_the_reason(eagle_target: Command, tmp_path: Path) -> None:
    result = eagle_target("serve", "--model", str(tmp_path / "absent"), "--port", "0", "-o", "local_files_only=true")

    assert result.returncode == 1
    assert f"error: cannot serve {tmp_path}/absent: " in result.stderr


def test_serves_until_sigterm(tiny_target: Path) -> None:
    arguments = ["--model", str(tiny_target), "-o", "device=cpu", "--transport", "wire"]

    with server_process(arguments) as server:
        deadline = time.monotonic() + 30
        while "serving" not in server.log and time.monotonic() < deadline:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        log = server.log

    assert f"serving {tiny_target} (float32, layers 1,3,4) with hf" in log
    assert "draining" in log
    assert "Traceback" not in log
