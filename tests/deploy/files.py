"""The deployment examples, and the command lines in them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMPOSE = DEPLOY / "compose.yaml"
UNIT = DEPLOY / "systemd" / "eagle-target.service"
IMAGE = "eagle-target:"
ENGINE = "vllm"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, lines that go on joined."""
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines() if line.strip()]


def container_line(image: str, arguments: list[str] | None = None) -> list[str]:
    """What a container of one of our images runs, with arguments of its own or those of the image."""
    given = dict(instructions(DEPLOY / "docker" / f"{image.removeprefix(IMAGE)}.Dockerfile"))
    return [*json.loads(given["ENTRYPOINT"]), *(json.loads(given.get("CMD", "[]")) if arguments is None else arguments)]


def services() -> dict[str, dict[str, Any]]:
    """Those of the compose file, with the defaults of its variables."""
    text = COMPOSE.read_text(encoding="utf-8").replace("${ENGINE:-vllm}", ENGINE)
    named: dict[str, dict[str, Any]] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]
    return named


def documents() -> list[dict[str, Any]]:
    """Every object of the manifests."""
    return [found for path in MANIFESTS for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def pods() -> dict[str, dict[str, Any]]:
    """The pods' specifications, by what makes them."""
    return {
        f"{found['kind']} {found['metadata']['name']}": found["spec"]["template"]["spec"]
        for found in documents()
        if "template" in found["spec" if "spec" in found else "metadata"]
    }


def unit() -> dict[str, list[str]]:
    """The service's settings; each may be given several times."""
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


def command_lines() -> dict[str, list[str]]:
    """Everything the examples run, by where it stands."""
    lines = {f"docker {path.stem}": container_line(path.stem) for path in DOCKERFILES}
    for name, service in services().items():
        lines[f"compose {name}"] = container_line(service["image"], service["command"])
    for pod, spec in pods().items():
        for container in spec["containers"]:
            lines[f"{pod} {container['name']}"] = container_line(container["image"], container["args"])
    (lines["systemd"],) = (shlex.split(text) for text in unit()["ExecStart"])
    return lines
