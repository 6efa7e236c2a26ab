"""One checkpoint under three engines, each served from its own environment: their supervision agrees pairwise."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.testing.server import server_process
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from eagle_target.contract.batch import Eagle3TargetBatch

pytestmark = [pytest.mark.engine_vllm, pytest.mark.engine_sglang]

ROOT = Path(__file__).parents[2]
VOCAB = 211
TOLERANCE = 5e-5
ENGINES: Mapping[str, tuple[str, dict[str, str]]] = {
    "hf": (sys.executable, {}),
    "vllm": (
        str(ROOT / ".venv-vllm" / "bin" / "python"),
        {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"},
    ),
    "sglang": (str(ROOT / ".venv-sglang" / "bin" / "python"), {"SGLANG_USE_CPU_ENGINE": "1"}),
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RemoteEagle3TargetModel]]:
    """A client of each engine."""
    checkpoint = _save_target(tmp_path_factory.mktemp("target"))
    with contextlib.ExitStack() as stack:
        opened = {}
        for engine, (python, environment) in ENGINES.items():
            assert Path(python).exists(), f"no environment for {engine}: make test-engines makes it"
            arguments = ["--engine", engine, "--model", str(checkpoint), "-o", "dtype=float32"]
            process = server_process(
                [*arguments, "--aux-layer-ids", "1,4,7"],
                python=python,
                environment={"OMP_NUM_THREADS": "1", **environment},
                ready_timeout=240.0,
            )
            url = stack.enter_context(process).url
            opened[engine] = stack.enter_context(RemoteEagle3TargetModel.from_urls([url], rows="all"))
            opened[engine].set_vocab_mapping(shuffled_mapping(VOCAB, 64))
        yield opened


@pytest.fixture(scope="module")
def batches(clients: dict[str, RemoteEagle3TargetModel]) -> dict[str, list[Eagle3TargetBatch]]:
    """The same padded and packed rows from each engine."""
    ids = torch.randint(0, VOCAB, (3, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    mask[2, 41:] = 0
    lengths = torch.tensor([[20, 40, 0], [43, 0, 0], [3, 8, 30]])
    return {
        engine: [
            client.generate_batch(ids, mask, torch.ones_like(ids)),
            client.generate_batch(ids, mask, torch.ones_like(ids), seq_lens=lengths),
        ]
        for engine, client in clients.items()
    }


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(ENGINES, 2)))
def test_supervision_agrees(batches: dict[str, list[Eagle3TargetBatch]], one: str, other: str) -> None:
    for ours, theirs in zip(batches[one], batches[other], strict=True):
        mine, yours = ours.tensors(), theirs.tensors()
        assert {*mine} == {*yours}
        for name, tensor in mine.items():
            if tensor.is_floating_point():
                assert float((tensor - yours[name]).abs().max()) <= TOLERANCE, name
            else:
                assert torch.equal(tensor, yours[name]), name


def test_each_batch_is_of_its_engine(clients: dict[str, RemoteEagle3TargetModel]) -> None:
    assert [client.model_info()["engine"] for client in clients.values()] == list(ENGINES)


def _save_target(path: Path) -> Path:
    """A Llama with the usual spread of weights, for an absolute tolerance; vLLM's CPU attention wants heads of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).float().save_pretrained(path)
    return path
