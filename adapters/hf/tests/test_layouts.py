"""Every layout gives what the model's own forward gives, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from eagle_target_hf import HFTargetRunner

from . import tiny

AUX = (0, 2, 3)
LENGTHS = (5, 11, 1, 11, 9, 3)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_ragged_forward_equals_own_forward(layout: str) -> None:
    model = tiny.build(layout)
    runner = HFTargetRunner(model)
    runner.set_aux_layers(AUX)
    input_ids, seq_lens = tiny.random_request(*LENGTHS)

    forward = runner.forward_eagle3(input_ids, seq_lens)

    aux, last, logits = tiny.oracle(model, input_ids, seq_lens, AUX)
    torch.testing.assert_close(forward.aux_hidden_states, aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward.last_hidden_states, last, atol=1e-5, rtol=1e-5)
    assert forward.logits is None
    torch.testing.assert_close(runner.compute_logits(last), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_draft_head_equals_columns_of_own_logits(layout: str) -> None:
    model = tiny.build(layout)
    runner = HFTargetRunner(model)
    input_ids, seq_lens = tiny.random_request(7)
    _, last, logits = tiny.oracle(model, input_ids, seq_lens, AUX)
    token_ids = torch.tensor([90, 3, 41, 0, 17])

    head = runner.draft_head(token_ids)

    assert head is not None
    torch.testing.assert_close(head.compute_logits(last), logits[:, token_ids], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_info_and_embedding(layout: str) -> None:
    model = tiny.build(layout)
    runner = HFTargetRunner(model)

    assert (runner.info.num_layers, runner.info.hidden_size) == (tiny.LAYERS, tiny.HIDDEN)
    assert (runner.info.vocab_size, runner.info.dtype, runner.info.engine) == (tiny.VOCAB, "float32", "hf")
    assert runner.info.max_seq_len == (None if layout == "bloom-alibi" else runner.info.max_seq_len)
    assert runner.input_embedding_weight().shape == (tiny.VOCAB, tiny.HIDDEN)
