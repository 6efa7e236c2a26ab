"""`eagle-target vocab` makes mappings from real files and describes them."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from eagle_target.cli.vocab import vocab
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import ConfigError, EagleTargetError, VocabMappingError
from eagle_target.vocab.token_counts import count_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[..., Path]

# id 4 three times, 2 twice, 0 and 1 once; of seven tokens
IDS = [4, 4, 4, 2, 2, 1, 0]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(vocab, [str(argument) for argument in arguments])


def result_of(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def error_of(*arguments: object) -> BaseException | None:
    """What main.py would print: the command lets our errors through."""
    result = run(*arguments)
    assert isinstance(result.exception, EagleTargetError), result.output
    return result.exception


def test_build_prints_the_coverage_it_reaches(write_jsonl: Write, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    data = write_jsonl([{"input_ids": IDS}])
    text = result_of("build", "--input", data, "--vocab-size", 8, "--size", 2, "--output", out)
    mapping = VocabMapping.from_file(out)
    assert mapping.selected_token_ids.tolist() == [4, 2]
    assert "71.43% with 2 ids (written)" in text  # 5 of 7
    assert "42.86% with 1 ids" in text
    assert "100.00% with 4 ids" in text
    assert "7, 4 different ones of 8" in text
    assert mapping.sha256 in text
    assert str(out) in text


def test_build_orders_by_target_id_on_request(write_jsonl: Write, tmp_path: Path) -> None:
    data, out = write_jsonl([{"input_ids": IDS}]), tmp_path / "m.pt"
    result_of("build", "--input", data, "--vocab-size", 8, "--size", 2, "--ascending", "--output", out)
    assert VocabMapping.from_file(out).selected_token_ids.tolist() == [2, 4]


def test_special_ids_are_always_in(write_jsonl: Write, tmp_path: Path) -> None:
    data, out = write_jsonl([{"input_ids": IDS}]), tmp_path / "m.pt"
    text = result_of(
        *("build", "--input", data, "--vocab-size", 8, "--size", 3, "--special", 7, "--special", 6, "--output", out)
    )
    assert sorted(VocabMapping.from_file(out).selected_token_ids.tolist()) == [4, 6, 7]
    assert "2 of the 3 ids never occur" in text


def test_build_from_text_takes_the_tokenizers_special_ids(
    write_jsonl: Write, tokenizer_folder: Path, tmp_path: Path
) -> None:
    data, out = write_jsonl([{"text": "Count the tokens, choose the best."}] * 3), tmp_path / "m.safetensors"
    arguments = ("build", "--input", data, "--tokenizer", tokenizer_folder, "--size", 8, "--output", out)
    text = result_of(*arguments)
    mapping = VocabMapping.from_file(out)
    assert mapping.vocab_size == 320
    assert mapping.selected_token_mask[:4].all()
    assert f"{mapping.coverage(count_tokens(data, tokenizer=tokenizer_folder)):.2%} with 8 ids (written)" in text
    result_of(*arguments, "--special", "none")
    assert not VocabMapping.from_file(out).selected_token_mask[1:4].any()


def test_the_same_data_gives_the_same_mapping(write_jsonl: Write, tokenizer_file: Path, tmp_path: Path) -> None:
    data = write_jsonl([{"text": "Count the tokens, choose the best."}, {"text": "The draft proposes."}])
    for name in ("a", "b"):
        result_of(
            *("build", "--input", data, "--tokenizer", tokenizer_file, "--vocab-size", 320, "--size", 64),
            *("--output", tmp_path / f"{name}.safetensors"),
        )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_several_inputs_and_only_supervised(write_jsonl: Write, tmp_path: Path) -> None:
    first = write_jsonl([{"ids": [1, 2], "loss_mask": [0, 1]}], "a.jsonl")
    second = write_jsonl([{"ids": [3, 2], "loss_mask": [0, 1]}], "b.jsonl.gz")
    text = result_of(
        *("build", "--input", first, "--input", second, "--field", "ids", "--only-supervised", "--vocab-size", 8),
        *("--size", 1, "--output", tmp_path / "m.pt"),
    )
    assert "100.00% with 1 ids" in text
    assert VocabMapping.from_file(tmp_path / "m.pt").selected_token_ids.tolist() == [2]


def test_build_refuses_before_it_counts(write_jsonl: Write, tmp_path: Path) -> None:
    base = ("build", "--input", write_jsonl(["never read"]), "--vocab-size", 8)
    out = ("--output", tmp_path / "m.pt")
    assert isinstance(error_of(*base, "--size", 2, "--output", tmp_path / "m.txt"), VocabMappingError)
    assert "must be 1 to 8, got 9" in str(error_of(*base, "--size", 9, *out))
    assert "pass --tokenizer" in str(error_of(*base, "--size", 2, "--special", "auto", *out))
    assert "--special eos: give a token id" in str(error_of(*base, "--size", 2, "--special", "eos", *out))
    assert "special ids must be 0 to 7" in str(error_of(*base, "--size", 2, "--special", "8", *out))
    assert "2 special ids do not fit" in str(error_of(*base, "--size", 1, "--special", 1, "--special", 2, *out))


def test_build_without_tokens_is_an_error(write_jsonl: Write, tmp_path: Path) -> None:
    data = write_jsonl([{"input_ids": [1], "loss_mask": [0]}])
    error = error_of(
        *("build", "--input", data, "--vocab-size", 8, "--size", 2, "--only-supervised"),
        *("--output", tmp_path / "m.pt"),
    )
    assert isinstance(error, ConfigError)
    assert "no tokens to count" in str(error)
    assert not (tmp_path / "m.pt").exists()


def test_show_describes_a_mapping(tmp_path: Path) -> None:
    mapping = VocabMapping.from_ids(torch.arange(11, -1, -1), 20)
    mapping.save(tmp_path / "m.safetensors")
    text = result_of("show", tmp_path / "m.safetensors")
    lines = dict(line.split(maxsplit=1) for line in text.replace("draft vocabulary", "size").splitlines())
    assert lines["size"] == "12 of 20"
    assert lines["sha256"] == mapping.sha256
    assert lines["ascending"] == "no"
    assert lines["identity"] == "no"
    assert "11, 10, 9, 8, 7, 6, 5, 4, ..." in text


def test_show_knows_the_identity_and_ids_alone(tmp_path: Path) -> None:
    save_file({"selected_token_ids": torch.arange(3)}, tmp_path / "ids.safetensors")
    assert "vocab_size" in str(error_of("show", tmp_path / "ids.safetensors"))
    text = result_of("show", tmp_path / "ids.safetensors", "--vocab-size", 3)
    assert text.count("yes") == 2
    assert "0, 1, 2\n" in text


@pytest.mark.parametrize("heavy", ["torch", "numpy", "pyarrow", "transformers", "tokenizers"])
def test_importing_the_command_is_fast(heavy: str) -> None:
    code = f"import sys, eagle_target.cli.vocab; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
