"""`eagle-target serve --engine sglang`, its engine in a process of its own, and a client in this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.testing.adapter_oracle import HFOracle, check_batch, check_batches, packed_input, padded_input
from eagle_target.testing.server import server_process
from eagle_target.testing.tiny import shuffled_mapping

from .checkpoints import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.testing.server import ServerProcess

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]

AUX = (7, 0, 4)
# Of transformers' two best logits: nearer than this either may win.
TIE = 1e-4


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> HFOracle:
    return HFOracle(save_checkpoint(tmp_path_factory.mktemp("odd"), "llama-odd"))


@pytest.fixture(scope="module")
def server(oracle: HFOracle) -> Iterator[ServerProcess]:
    model = ["--engine", "sglang", "--model", str(oracle.model.name_or_path), "-o", "in_process=false"]
    with server_process([*model, "--aux-layer-ids", "7,0,4"], ready_timeout=240.0) as running:
        yield running


@pytest.fixture
def url(server: ServerProcess) -> str:
    return server.url


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_a_client_gets_what_transformers_computes(url: str, oracle: HFOracle, encoding: str) -> None:
    mapping = shuffled_mapping(oracle.vocab_size, 300)
    with RemoteEagle3TargetModel.from_urls([url], encoding=encoding, transport="wire") as client:
        client.set_vocab_mapping(mapping)
        for given in (
            padded_input([33, 5, 80], oracle.vocab_size, left=True),
            packed_input([[9, 4, 1], [17]], oracle.vocab_size),
        ):
            check_batch(
                client.generate_batch(**given.arguments()).tensors(),
                given,
                oracle,
                aux_layer_ids=AUX,
                selected_token_ids=mapping.selected_token_ids.tolist(),
                tolerance=1e-4,
            )


def test_masks_are_those_of_transformers_except_at_ties(url: str, oracle: HFOracle) -> None:
    lengths = (700, 64, 2, 130, 1)
    given = padded_input(lengths, oracle.vocab_size, seed=1)
    # Half of the vocabulary, so that about half of the positions are masked.
    mapping = shuffled_mapping(oracle.vocab_size, oracle.vocab_size // 2)
    with RemoteEagle3TargetModel.from_urls([url], rows="all", transport="wire") as client:
        client.set_vocab_mapping(mapping)
        batch = client.generate_batch(given.input_ids, given.attention_mask, given.attention_mask).tensors()

    compared = 0
    for row, length in enumerate(lengths):
        logits = oracle.run(given.input_ids[row, :length].tolist()).logits[1:]
        two_best = logits.topk(2).values
        clear = two_best[:, 0] - two_best[:, 1] > TIE
        masks = batch["position_mask"][row, : length - 1, 0]
        assert torch.equal(masks[clear], mapping.selected_token_mask[logits.argmax(dim=1)][clear]), f"row {row}"
        compared += int(clear.sum())
    assert compared > 0.99 * sum(length - 1 for length in lengths), "too many ties for a comparison"


def test_z_a_rank_killed_under_a_prefetch_costs_a_pause(server: ServerProcess, oracle: HFOracle) -> None:
    ranks = psutil.Process(server.process.pid).children(recursive=True)
    mapping = shuffled_mapping(oracle.vocab_size, 300)
    inputs = [padded_input([33, 5, 80], oracle.vocab_size, seed=step) for step in range(4)]
    with RemoteEagle3TargetModel.from_urls([server.url], transport="wire", timeout=240.0) as client:
        client.set_vocab_mapping(mapping)
        check_batches(
            client.prefetch([given.arguments() for given in inputs], depth=2),
            inputs,
            oracle,
            aux_layer_ids=AUX,
            selected_token_ids=mapping.selected_token_ids.tolist(),
            tolerance=1e-4,
            after_first=max(ranks, key=lambda rank: rank.memory_info().rss).kill,
        )
    _, alive = psutil.wait_procs(ranks, timeout=30.0)
    assert not alive
