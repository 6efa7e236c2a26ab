"""Bytes a token: the table, and the formula against what travels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target import RemoteEagle3TargetModel
from eagle_target.bench.sizes import KNOWN_MODELS, bytes_per_token, known_sizes, reference_bytes_per_token
from eagle_target.contract.target import TargetInfo
from eagle_target.testing.tiny import EmbeddingRunner
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from eagle_target.testing.fixtures import ServeOnLoopback


def test_the_known_models_are_those_of_the_design() -> None:
    sizes = {row.model: row for row in known_sizes()}

    assert len(sizes) == 4
    llama = sizes["Llama-3.1-8B"]
    # As benchmarks/wire.py counts on the reference's own wire, its header left out.
    assert llama.reference == 152_593
    assert llama.probs_float32 == 24_576 + 128_000 + 8
    assert llama.probs_bfloat16 == 24_576 + 64_000 + 8
    assert llama.hidden == 24_576 + 8_192 + 8


def test_hidden_is_smaller_wherever_the_draft_has_more_than_twice_as_many_ids_as_the_target_is_wide() -> None:
    for row in known_sizes(draft_vocab_size=32_000):
        assert row.hidden < row.probs_bfloat16 < row.probs_float32 < row.reference


def test_pads_and_rows_without_loss_count_for_the_reference_only() -> None:
    info = KNOWN_MODELS[0].info

    assert reference_bytes_per_token(info, draft_vocab_size=100, pad_ratio=0.5) == 2 * reference_bytes_per_token(
        info, draft_vocab_size=100
    )
    half = bytes_per_token(info, "probs", draft_vocab_size=1000, loss_ratio=0.5)
    assert half == 24_576 + 0.5 * (4000 + 8)


@pytest.mark.parametrize(
    ("encoding", "probs_dtype"),
    [("probs", torch.float32), ("probs", torch.bfloat16), ("hidden", torch.float32), ("logits", torch.float32)],
)
@pytest.mark.parametrize("pad_ratio", [0.0, 0.5])
def test_what_travels_is_within_two_percent_of_the_formula(
    loopback_server: ServeOnLoopback, encoding: Any, probs_dtype: torch.dtype, pad_ratio: float
) -> None:
    server = loopback_server(lambda: EmbeddingRunner(vocab_size=600, hidden_size=64))
    workload = Workload(batch=4, seq=256, draft_vocab=400, loss_ratio=0.5, pad_ratio=pad_ratio)
    with RemoteEagle3TargetModel.from_urls(
        [server.url], encoding=encoding, probs_dtype=probs_dtype, transport="wire"
    ) as target:
        target.set_vocab_mapping(workload.make_mapping(600))
        target.generate_batch(*workload.make_inputs(600, seed=0)[0])
        facts = target.model_info()
    info = TargetInfo.model_validate({name: value for name, value in facts.items() if name in TargetInfo.model_fields})
    expected = bytes_per_token(info, encoding, draft_vocab_size=400, loss_ratio=0.5, probs_dtype=probs_dtype)

    assert facts["traffic"]["tokens"] == workload.real_tokens
    assert facts["traffic"]["bytes_received"] / workload.real_tokens == pytest.approx(expected, rel=0.02)
