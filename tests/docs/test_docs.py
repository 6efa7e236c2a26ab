"""Every example of the documentation runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from eagle_target.config import ServerConfig
from eagle_target.contract.request import SupervisionRequest
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.protocol.messages import encode_request
from eagle_target.targets import load_runner
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import save_tiny_target
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, read_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
VOCAB = 211


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_target(tmp_path_factory.mktemp("target"), vocab=VOCAB)
    _save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with loopback_server(lambda: load_runner("hf", str(checkpoint), {})) as server:
        yield server.url


@pytest.fixture
def replacements(checkpoint: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A folder with the files the examples name, and what to replace in them."""
    monkeypatch.chdir(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6]}, {"input_ids": [7, 8, 9]}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("train.jsonl").write_text('{"text": "to be or not to be"}\n' * 20, encoding="utf-8")
    _mapping().save(Path("vocab.safetensors"))
    request = SupervisionRequest(
        input_ids=torch.tensor([1, 2, 3]), seq_lens=(3,), row_mask=torch.tensor([False, True, True]), encoding="hidden"
    )
    Path("request.safetensors").write_bytes(b"".join(encode_request(request)))
    server = next(block for block in read_blocks(ROOT / "README.md") if block.language == "yaml")
    changes = {
        MODEL: str(checkpoint),
        "http://gpu-7:8001": url,
        "dtype=bfloat16": "dtype=float32",
        "--size 32000": "--size 40",
    }
    Path("server.yaml").write_text(server.fit(changes), encoding="utf-8")
    return changes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_name_a_known_language(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("\n```") % 2 == 0
    assert {block.language for block in read_blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=lambda block: block.name)
def test_settings_are_valid(block: Block) -> None:
    ServerConfig.model_validate(yaml.safe_load(block.text))


@pytest.mark.parametrize("block", blocks_of("sh"), ids=lambda block: block.name)
def test_commands_run(block: Block, replacements: dict[str, str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in block.fit(replacements).splitlines():
        words = shlex.split(line, comments=True)
        match words:
            case ["eagle-target", *arguments]:
                _run([sys.executable, "-m", "eagle_target", *_without_serving(arguments)])
            case ["curl", *_] if shutil.which("curl"):
                _run([*words, "--fail"])
            case ["make", *targets]:
                for target in targets:
                    assert "=" in target or f"\n{target}:" in makefile
            case ["pip", "install", *folders]:
                for folder in folders:
                    assert (ROOT / folder / "pyproject.toml").exists() or not folder.startswith(".")
            case _:
                assert not words or words[0] in ("curl", "pytest", "cd"), f"{block.name}: {line!r} is not tested"


@pytest.mark.parametrize("page", [page for page in PAGES if read_blocks(page)], ids=lambda page: page.name)
def test_python_runs_in_order(page: Path, replacements: dict[str, str]) -> None:
    namespace: dict[str, Any] = {"__name__": "example", **_trainer()}
    for block in read_blocks(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.fit(replacements), str(page), "exec"), namespace)


def test_the_guides_adapter_conforms(tmp_path: Path) -> None:
    """The page's adapter passes the suite as the page says; its transport and what needs it installed are elsewhere."""
    blocks = [block.text for block in read_blocks(ROOT / "docs" / "plugins.md") if block.language == "python"]
    adapter = "\n".join(text for text in blocks if "Transport" not in text and "Served" not in text)
    (tmp_path / "test_plain.py").write_text(adapter, encoding="utf-8")
    chosen = "ragged or packed or padded or layer or head"
    _run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(tmp_path)])


def _trainer() -> dict[str, Any]:
    """What the examples take for granted: a draft, a trainer, a data loader, one batch."""
    input_ids = torch.arange(24).view(2, 12)
    ones = torch.ones_like(input_ids)
    row = {"input_ids": input_ids, "attention_mask": ones, "loss_mask": ones}
    return {
        **row,
        "mapping": _mapping(),
        "dataloader": [row, row, row],
        "draft": SimpleNamespace(embed=torch.nn.Embedding(VOCAB, 1)),
        "trainer": lambda **inputs: inputs["target_probs"].sum(),
    }


def _mapping() -> VocabMapping:
    return VocabMapping.from_ids(torch.arange(100, 20, -2), VOCAB)


def _without_serving(arguments: list[str]) -> list[str]:
    serves = arguments[:1] == ["serve"] and "--print-config" not in arguments
    return [*arguments, "--print-config"] if serves else arguments


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]} {done.stderr}"


def _save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "to", "be", "or", "not"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
