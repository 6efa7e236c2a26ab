"""A stranger's plugin, installed from its folder: it passes the suites, is listed, and serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eagle_target import RemoteEagle3TargetModel
from eagle_target.testing.adapter_oracle import HFOracle, check_batch, padded_input
from eagle_target.testing.server import ServerNotReady, server_process
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

SOURCE = Path(__file__).parents[1] / "thirdparty" / "eagle-target-toy"


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables that put the installed plugin on the path of a process."""
    folder = tmp_path_factory.mktemp("installed")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    run([sys.executable, "-m", "pip", "install", *flags, "--target", str(folder), str(SOURCE)], {})
    # A server that is killed leaves the transport's files: here, not in the system's folder.
    files = tmp_path_factory.mktemp("toyfile")
    return {"PYTHONPATH": str(folder), "EAGLE_TARGET_TRANSPORT_OPTIONS__TOYFILE__FOLDER": str(files)}


def run(command: list[str], environment: Mapping[str, str]) -> str:
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_its_own_tests_pass_and_with_them_the_suites(with_toy: dict[str, str], tmp_path: Path) -> None:
    flags = ["-q", "-W", "error", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]

    output = run([sys.executable, "-m", "pytest", *flags, "-c", os.devnull, str(SOURCE / "tests")], with_toy)

    assert " passed" in output
    assert "skipped" not in output


def test_is_listed_with_its_version_and_options(with_toy: dict[str, str]) -> None:
    command = [sys.executable, "-m", "eagle_target", "plugins"]

    rows = [line.split() for line in run(command, with_toy).splitlines()]
    options = run([*command, "--options", "toy"], with_toy)

    assert ["engine", "toy", "0.3.0", "eagle-target-toy", "0.3.0", "yes"] in rows
    assert ["transport", "toyfile", "-", "eagle-target-toy", "0.3.0", "yes"] in rows
    assert "Longest sequence in tokens" in options


def test_serves_a_client_that_has_not_installed_it(with_toy: dict[str, str], tiny_target: Path) -> None:
    oracle = HFOracle(tiny_target)
    mapping = shuffled_mapping(oracle.vocab_size, 40)
    given = padded_input([9, 3, 14], oracle.vocab_size)
    arguments = ["--engine", "toy", "--model", str(tiny_target), "--aux-layer-ids", "5,0,3", "-o", "max_seq_len=64"]

    with (
        server_process(arguments, environment=with_toy) as process,
        RemoteEagle3TargetModel.from_urls([process.url]) as client,
    ):
        client.set_vocab_mapping(mapping)
        tensors = client.generate_batch(**given.arguments()).tensors()
        info = client.model_info()

    assert (info["engine"], info["engine_version"], info["max_seq_len"]) == ("toy", "0.3.0", 64)
    assert info["servers"][0]["transport"] == "shm"
    check_batch(
        tensors,
        given,
        oracle,
        aux_layer_ids=(0, 3, 5),
        selected_token_ids=mapping.selected_token_ids.tolist(),
        tolerance=1e-4,
    )


def test_its_refusal_of_a_checkpoint_ends_the_server_with_the_reason(with_toy: dict[str, str], tmp_path: Path) -> None:
    with (
        pytest.raises(ServerNotReady, match=r"exit status 1(.|\n)*no readable config\.json"),
        server_process(["--engine", "toy", "--model", str(tmp_path)], environment=with_toy),
    ):
        pass
