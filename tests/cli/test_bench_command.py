"""`eagle-target bench`, from the command to its table, its JSON and its page."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from eagle_target.testing.fixtures import ServeOnLoopback

    from .conftest import Command

TOKEN = "correct-horse-battery-staple"
QUICK = ["--batch", "2", "--seq", "32", "--rounds", "1", "--seconds", "0.05"]


def test_servers_are_measured_and_compared_and_advice_is_given(
    eagle_target: Command, loopback_server: ServeOnLoopback, tmp_path: Path
) -> None:
    one, other = loopback_server(), loopback_server()
    files = ["--json", str(tmp_path / "bench.json"), "--html", str(tmp_path / "bench.html")]
    result = eagle_target(
        *["bench", "--target", f"one={one.url}", "--target", f"other={other.url}", *QUICK, *files],
        *["--transport", "wire,none", "--encoding", "hidden,probs", "--clients", "1,2"],
        *["--advise", "--step-time", "0.5"],
    )

    assert result.returncode == 0, result.stderr
    assert "none" in result.stdout
    assert "there is no transport 'none'" in result.stdout
    assert "one, wire, hidden: 1 server, prefetch depth 2" in result.stdout
    assert "other against one: within the tolerances" in result.stdout
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    measured = [cell for cell in found["cells"] if cell["problem"] is None]
    assert len(found["cells"]) == 2 * 2 * 2 * 2 * 2  # targets, transports, encodings, clients, depths
    assert len(measured) == len(found["cells"]) // 2
    assert {cell["transport"] for cell in measured} == {"wire"}
    assert {cell["server_memory_source"] for cell in measured} == {"/metrics"}
    assert all(cell["tokens_per_second"] > 0 and cell["client_peak_mb"] > 0 for cell in measured)
    assert {*measured[0]["stage_ms"]} >= {"queue", "forward", "projection", "transfer", "assembly"}
    assert len(found["advice"]) == 4
    assert found["parity"][0]["within"] is True
    assert "<svg" in (tmp_path / "bench.html").read_text(encoding="utf-8")


def test_servers_that_want_a_token_are_measured_and_compared_with_that_of_a_file(
    eagle_target: Command, loopback_server: ServeOnLoopback, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n", encoding="ascii")
    one, other = (loopback_server(token_file=token_file) for _ in range(2))
    asked = ["bench", "--target", f"one={one.url}", "--target", f"other={other.url}", *QUICK, "--transport", "wire"]
    result = eagle_target(*asked, "--token-file", str(token_file), "--json", str(tmp_path / "bench.json"))

    assert result.returncode == 0, result.stderr
    assert "other against one: within the tolerances" in result.stdout
    found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [cell["problem"] for cell in found["cells"]] == [None, None]
    # Looked at with the token, too.
    assert all(cell["server_peak_mb"] > 0 for cell in found["cells"])
    assert TOKEN not in f"{result.stdout}{result.stderr}{found}"


def test_a_server_is_started_and_ended(eagle_target: Command, tiny_target: Path) -> None:
    result = eagle_target(
        *["bench", "--launch", f"hf={sys.executable}", "--model", str(tiny_target), *QUICK],
        *["--launch-option", "hf:dtype=float32", "--transport", "wire"],
    )

    assert result.returncode == 0, result.stderr
    assert "hf: peak of the server from /proc" in result.stdout


def test_nothing_measured_is_a_failure(eagle_target: Command, loopback_server: ServeOnLoopback) -> None:
    result = eagle_target("bench", "--target", f"one={loopback_server().url}", "--transport", "none", *QUICK)

    assert result.returncode == 1
    assert "there is no transport 'none'" in result.stdout


def test_bytes_of_known_models_are_shown(eagle_target: Command, tmp_path: Path) -> None:
    path = tmp_path / "bytes.json"
    result = eagle_target("bench", "--bytes", "--loss-ratio", "1", "--json", str(path))

    assert result.returncode == 0
    assert "152,593" in result.stdout
    assert json.loads(path.read_text(encoding="utf-8"))[0]["model"] == "Llama-3.1-8B"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--target", "http://gpu-7:8001/"], "not of the form NAME=VALUE"),
        (["--target", "a=b", "--target", "a=c"], "'a' twice"),
        (["--target", "a=b", "--clients", "one"], "--clients takes numbers"),
        (["--target", "a=b", "--encoding", "proobs"], "--encoding takes probs, hidden, logits"),
        (["--target", "a=b", "--advise"], "--advise needs --step-time"),
        (["--target", "a=b", "--launch-option", "dtype=float32"], "not of the form ENGINE:KEY=VALUE"),
        (["--target", "a=b", "--loss-ratio", "2"], "loss_ratio must be"),
        (["--target", "a=b", "--token-file", "/no/such/token"], "/no/such/token"),
        (["--target", "a=b", "--client-cert", "cert.pem"], "both client_cert and client_key"),
        (["--launch", "hf=python"], "--launch starts servers, which need --model"),
        (["--launch", "hf=/no/such/python", "--model", "m"], "/no/such/python cannot be run"),
    ],
)
def test_what_cannot_be_measured_says_why(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused("bench", *arguments)
