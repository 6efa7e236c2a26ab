"""`eagle-target verify`: two targets that agree, and two that do not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from eagle_target.targets import load_runner
from eagle_target.testing.tiny import EmbeddingRunner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from eagle_target.testing.fixtures import ServeOnLoopback

    from .conftest import Command


def test_a_server_that_gives_what_the_engine_gives_is_verified(
    eagle_target: Command, loopback_server: ServeOnLoopback, tiny_target: Path, tmp_path: Path
) -> None:
    url = loopback_server(lambda: load_runner("hf", str(tiny_target), {})).url
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2, 3, 4]}\n{"input_ids": [5, 6]}\n', encoding="utf-8")
    path = tmp_path / "verify.json"
    result = eagle_target(
        *["verify", url, "--reference", "hf", "--model", str(tiny_target), "-o", "device=cpu"],
        *["--tokens", str(rows), "--draft-vocab", "50", "--json", str(path)],
    )

    assert result.returncode == 0, result.stderr
    assert "6 tokens, 4 predictions" in result.stdout
    assert "TOO FAR" not in result.stdout
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["within"] is True
    assert found["hidden_relative"] == [0.0, 0.0, 0.0]


def test_two_servers_that_differ_fail_with_the_worst_positions(
    eagle_target: Command, loopback_server: ServeOnLoopback
) -> None:
    one, other = loopback_server(), loopback_server(lambda: EmbeddingRunner(seed=1))
    asked = ["verify", one.url, "--reference", other.url, "--sequences", "2", "--seq", "16", "--worst", "3"]
    result = eagle_target(*asked)

    assert result.returncode == 1
    assert "TOO FAR" in result.stdout
    assert "The positions with the largest KL" in result.stdout
    assert result.stderr.splitlines()[-1] == "past the tolerances"
    loose = ["--hidden-tolerance", "9", "--kl-tolerance", "99", "--argmax-tolerance", "1", "--mask-tolerance", "1"]
    assert eagle_target(*asked, *loose).returncode == 0


def test_servers_that_want_a_token_are_compared_with_that_of_a_file(
    eagle_target: Command, loopback_server: ServeOnLoopback, tmp_path: Path
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("correct-horse-battery-staple\n", encoding="ascii")
    one, other = (loopback_server(token_file=token_file).url for _ in range(2))
    result = eagle_target("verify", one, "--reference", other, "--seq", "16", "--token-file", str(token_file))

    assert result.returncode == 0, result.stderr


def test_a_reference_that_cannot_be_is_refused(
    refused: Callable[..., str], loopback_server: ServeOnLoopback, tmp_path: Path
) -> None:
    url = loopback_server().url

    assert "for a reference in this process" in refused("verify", url, "--reference", url, "--model", "m")
    assert "there is no adapter 'hff'" in refused("verify", url, "--reference", "hff")
    assert "cannot read" in refused("verify", url, "--tokens", str(tmp_path / "nothing.jsonl"))
    wider = loopback_server(lambda: EmbeddingRunner(hidden_size=32)).url
    assert "hidden_size: 16 and 32" in refused("verify", url, "--reference", wider)
