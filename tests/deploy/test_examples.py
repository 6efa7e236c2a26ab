"""What the deployment examples say fits the command, the packages and each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from eagle_target.auth import check_token
from eagle_target.cli.serve import serve
from eagle_target.cli.settings import given_settings, read_transport_options
from eagle_target.config import ServerConfig, load_config
from eagle_target.errors import ConfigError
from eagle_target.plugins.options import build_model, parse_assignments
from eagle_target.plugins.registry import load_plugins
from tests.deploy.files import DOCKERFILES, ENGINE, ROOT, command_lines, documents, instructions, pods, services, unit

if TYPE_CHECKING:
    from collections.abc import Iterator

LINES = command_lines()
SERVERS = sorted(name for name, words in LINES.items() if "serve" in words)
TRAINERS = sorted({*LINES} - {*SERVERS})
# In a Dockerfile the model is not known yet.
STAND_IN = ("--model", "stand-in")


def settings_of(words: list[str]) -> ServerConfig:
    """Have the command's own parser read a command line, and check the settings it makes; nothing is served."""
    assert Path(words[0]).name == "eagle-target"
    assert words[1] == "serve"
    with serve.make_context("serve", [*words[2:], *(() if "--model" in words else STAND_IN)]) as context:
        flags: dict[str, Any] = dict(context.params)
    assert not flags.pop("print_config")
    flags.pop("config")
    engine_options = parse_assignments(flags.pop("engine_option"), "-o")
    transport_options = read_transport_options(flags.pop("transport_option"))
    overrides = {**given_settings(flags), "engine_options": engine_options, "transport_options": transport_options}
    return load_config(ServerConfig, path=None, environment={}, overrides=overrides)


@pytest.mark.parametrize("name", SERVERS)
def test_the_command_takes_every_option(name: str) -> None:
    settings = settings_of(LINES[name])
    plugins = load_plugins()
    build_model(plugins.adapters.get(settings.engine).options_model, settings.engine_options, "options")
    for transport, options in settings.transport_options.items():
        build_model(plugins.transports.get(transport).options_model, options, "options")


def test_an_option_that_is_not_there_is_noticed() -> None:
    with pytest.raises(click.NoSuchOption):
        settings_of(["eagle-target", "serve", "--on-engine-fail", "exit"])


@pytest.mark.parametrize("name", SERVERS)
def test_no_server_stands_open(name: str) -> None:
    settings = settings_of(LINES[name])
    assert not settings.insecure
    assert settings.token_file is not None
    assert settings.token is None


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_run_an_example_that_is_there(name: str) -> None:
    words = LINES[name]
    assert words[0] == "torchrun"
    (script,) = (word.removeprefix("/opt/eagle-target/") for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    assert ("COPY", f"{script} {script}") in instructions(ROOT / "examples/deploy/docker/trainer.Dockerfile")


def copied(dockerfile: Path) -> Iterator[Path]:
    """What a Dockerfile takes from the checkout."""
    for name, arguments in instructions(dockerfile):
        if name == "COPY":
            *sources, _ = arguments.split()
            yield from (Path(source) for source in sources)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_copies_is_let_through_and_enough_to_install(path: Path, tmp_path: Path) -> None:
    let_through = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    for source in copied(path):
        assert {str(source), *map(str, source.parents)} & let_through, source
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        take = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        take(ROOT / source, tmp_path / source)
    adapter = [] if path.stem == "trainer" else [f"./adapters/{path.stem}"]
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*build, "-w", "wheels", ".", *adapter], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    names = [name for wheel in (tmp_path / "wheels").iterdir() for name in zipfile.ZipFile(wheel).namelist()]
    assert {"eagle_target/cli/main.py", "eagle_target_wire/transport.py"} <= {*names}
    assert not adapter or f"eagle_target_{path.stem}/__init__.py" in names


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_run_as_a_user_without_rights_and_hold_no_secret(path: Path) -> None:
    users = [arguments for name, arguments in instructions(path) if name == "USER"]
    assert users[-1] == "10001:10001"
    assert not [arguments for name, arguments in instructions(path) if name in ("ENV", "ARG") and "TOKEN" in arguments]


def test_time_to_drain_is_granted() -> None:
    granted = {"compose server": float(services()["server"]["stop_grace_period"].removesuffix("s"))}
    granted["systemd"] = float(unit()["TimeoutStopSec"][0])
    for name, pod in pods().items():
        granted[f"{name} server"] = pod["terminationGracePeriodSeconds"]
    assert {*granted} == {name for name in SERVERS if not name.startswith("docker")}
    for name, seconds in granted.items():
        assert seconds > settings_of(LINES[name]).drain_timeout, name


@pytest.mark.parametrize("name", sorted(pods()))
def test_pods_keep_to_themselves(name: str) -> None:
    pod = pods()[name]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in pod["containers"]:
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_probes_and_ports_are_those_of_the_server() -> None:
    (container,) = pods()["StatefulSet eagle-target"]["containers"]
    settings = settings_of(LINES["StatefulSet eagle-target server"])
    paths = {probe: container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "nccl": settings.transport_options["nccl"]["port"]}
    (allowed,) = (
        found["spec"]["ingress"][0]["ports"]
        for found in documents()
        if found["kind"] == "NetworkPolicy" and found["metadata"]["name"].endswith("server")
    )
    assert {*ports.values()} <= {port["port"] for port in allowed}


def test_the_secret_of_the_example_is_no_token() -> None:
    (secret,) = (found for found in documents() if found["kind"] == "Secret")
    with pytest.raises(ConfigError):
        check_token(secret["stringData"]["token"], "the token")


def test_the_compose_file_builds_what_it_names() -> None:
    for name, service in services().items():
        build = service["build"]
        assert (ROOT / "examples" / "deploy" / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert service["image"] == f"eagle-target:{'trainer' if name == 'trainer' else ENGINE}"


def test_the_page_names_every_file() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples" / "deploy").rglob("[!.]*"):
        assert path.is_dir() or path.name in page, path.name
