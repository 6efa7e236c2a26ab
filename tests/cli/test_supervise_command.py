"""`eagle-target supervise` against a real server: what it writes opens with the stock library."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from eagle_target import RunnerEagle3TargetModel
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from eagle_target.testing.fixtures import ServeOnLoopback

    from .conftest import Command

ROWS = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}, {"input_ids": [9, 10]}, {"input_ids": [3]}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_writes_the_batch_of_a_colocated_target(
    eagle_target: Command, loopback_server: ServeOnLoopback, source: Path, tmp_path: Path, encoding: str
) -> None:
    mapping, output = shuffled_mapping(211, 30), tmp_path / "batch.safetensors"
    mapping.save(tmp_path / "mapping.safetensors")
    url = loopback_server().url
    colocated = RunnerEagle3TargetModel(EmbeddingRunner(), encoding=encoding)  # type: ignore[arg-type]
    colocated.set_vocab_mapping(mapping)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [3, 0, 0, 0]])
    loss = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])

    flags = ["--url", url, "--input", str(source), "--output", str(output), "--encoding", encoding]
    result = eagle_target("supervise", *flags, "--vocab-mapping", str(tmp_path / "mapping.safetensors"))

    assert result.returncode == 0, result.stderr
    assert_same_bits(load_file(output), colocated.generate_batch(ids, (ids > 0).long(), loss).tensors())
    with safetensors.safe_open(output, "pt") as file:
        assert file.metadata()["vocab_mapping"] == mapping.sha256
    assert "aux_hidden_states    float32   [3, 4, 48]" in result.stdout
    assert f"written to {output}" in result.stdout


def test_without_a_mapping_every_id_is_in_the_draft(
    eagle_target: Command, loopback_server: ServeOnLoopback, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "batch.safetensors"

    result = eagle_target(
        "supervise", "--url", loopback_server().url, "--input", str(source), "--output", str(output), "--rows", "all"
    )

    assert result.returncode == 0, result.stderr
    assert list(load_file(output)["target_probs"].shape) == [3, 4, 211]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"not json", ":1: expected"),
        (b'{"input_ids": [1]}\n{"ids": [1]}', ":2: expected"),
        (b'{"input_ids": []}', ":1: 0 input_ids"),
        (b'{"input_ids": [1, 2], "loss_mask": [1]}', "2 input_ids and 1 of loss_mask"),
        (b'{"input_ids": 3}', ":1: expected"),
        (b'{"input_ids": ["x"]}', ":1: expected"),
        (b'{"input_ids": [null]}', ":1: expected"),
        (b"[1, 2]", ":1: expected"),
        (b'{"input_ids": [1], "loss_mask": 1}', ":1: expected"),
        (b'{"input_ids": [99999999999999999999999]}', ":1: "),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_wrong_rows_are_refused_before_a_server_is_asked(
    refused: Callable[..., str], tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)

    assert message in refused("supervise", "--url", "http://127.0.0.1:1", "--input", str(path), "--output", "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "not ready after 0.5 s"),
        (["--url", "ftp://somewhere"], "is not the URL of a server"),
        (["--url", "http://127.0.0.1:1", "--input", "/absent"], "cannot read /absent"),
    ],
)
def test_errors_are_one_line(
    refused: Callable[..., str], source: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    defaults = ["--input", str(source), "--output", str(tmp_path / "out"), "--timeout", "0.5"]

    assert message in refused("supervise", *defaults, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transport", "nope"], "there is no transport 'nope'"),
        (["--vocab-mapping", "/absent.safetensors"], "/absent.safetensors"),
        (["--output", "/absent/folder/out.safetensors"], "cannot write /absent/folder/out.safetensors"),
    ],
)
def test_errors_with_a_server_are_one_line(
    refused: Callable[..., str],
    loopback_server: ServeOnLoopback,
    source: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    defaults = ["--url", loopback_server().url, "--input", str(source), "--output", str(tmp_path / "out")]

    assert message in refused("supervise", *defaults, "--timeout", "5", *flags)


def test_a_transport_that_cannot_work_is_refused_and_not_replaced(
    eagle_target: Command, loopback_server: ServeOnLoopback, source: Path, tmp_path: Path
) -> None:
    flags = ["--input", str(source), "--output", str(tmp_path / "out"), "--transport", "inprocess", "--timeout", "0.5"]

    result = eagle_target("supervise", "--url", loopback_server().url, *flags)

    assert result.returncode == 1
    assert "the server runs in another process" in result.stderr
    assert not (tmp_path / "out").exists()
