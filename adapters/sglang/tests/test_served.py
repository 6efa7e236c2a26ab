"""`eagle-target serve --engine sglang` in a process of its own, and a client in this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.testing.adapter_oracle import HFOracle, check_batch, packed_input, padded_input
from eagle_target.testing.server import server_process
from eagle_target.testing.tiny import shuffled_mapping

from .checkpoints import save_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("default")]

AUX = (7, 0, 4)


@pytest.mark.parametrize("in_process", ["true", "false"])
def test_a_client_gets_what_transformers_computes(tmp_path: Path, in_process: str) -> None:
    checkpoint = save_checkpoint(tmp_path, "llama-odd")
    oracle = HFOracle(checkpoint)
    mapping = shuffled_mapping(oracle.vocab_size, 300)
    arguments = ["--engine", "sglang", "--model", str(checkpoint), "-o", f"in_process={in_process}"]
    with server_process([*arguments, "--aux-layer-ids", "7,0,4"], ready_timeout=240.0) as server:
        for encoding in ("probs", "hidden"):
            with RemoteEagle3TargetModel.from_urls([server.url], encoding=encoding, transport="wire") as client:
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
