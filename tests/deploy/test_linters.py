"""Linters have nothing to say about the deployment examples."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.files import COMPOSE, DEPLOY, DOCKERFILES, MANIFESTS, UNIT

# As systemd-analyze counts exposure, in tenths: what a service that uses GPUs and compiles kernels still is.
MOST_EXPOSURE = "40"


def lint(*command: str) -> None:
    """Run a linter of this environment, or else of the machine."""
    found = shutil.which(command[0], path=str(Path(sys.executable).parent)) or shutil.which(command[0])
    if found is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([found, *command[1:]], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles(path: Path) -> None:
    lint("hadolint", "--no-color", str(path))


def test_the_compose_file() -> None:
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests(path: Path) -> None:
    lint("kubernetes-validate", "--strict", str(path))


def test_yaml() -> None:
    lint("yamllint", "--strict", "-c", str(DEPLOY / ".yamllint.yaml"), str(DEPLOY))


@pytest.fixture
def unit_here(tmp_path: Path) -> Path:
    """The unit, with the command of this environment: the linter looks for the program."""
    command = str(Path(sys.executable).with_name("eagle-target"))
    text = UNIT.read_text(encoding="utf-8").replace("/opt/eagle-target/bin/eagle-target", command)
    path = tmp_path / UNIT.name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_unit(unit_here: Path) -> None:
    lint("systemd-analyze", "verify", "--man=no", str(unit_here))


def test_the_units_exposure(unit_here: Path) -> None:
    lint("systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}", str(unit_here))
