"""What is found out about a model at load: how its sequences may share a batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from eagle_target_hf import HFTargetRunner
from eagle_target_hf.batching import FORWARD_COST

from eagle_target.errors import AdapterError

from . import tiny

AUX = (0, 2, 3)


class SeesWholeRow(transformers.LlamaModel):  # type: ignore[misc]
    """Adds the mean over the row to every hidden state, pads included."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + self.row_mean(hidden, attention_mask)
        return output

    def row_mean(self, hidden: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        return hidden.mean(1, keepdim=True)


class SeesUnmaskedRow(SeesWholeRow):
    """Adds the mean over the tokens that the mask leaves."""

    def row_mean(self, hidden: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        mask = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        return (hidden * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]


def with_decoder(decoder_class: Any) -> Any:
    model = tiny.build("llama")
    decoder = decoder_class(model.config)
    decoder.load_state_dict(model.model.state_dict())
    model.model = decoder
    return model


@pytest.mark.parametrize(("decoder_class", "layout"), [(SeesUnmaskedRow, "masked"), (SeesWholeRow, "equal")])
def test_sequences_share_a_batch_only_where_they_do_not_see_each_other(
    decoder_class: Any, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_decoder(decoder_class)
    input_ids, seq_lens = tiny.random_request(5, 11, 2, 11)

    with caplog.at_level(logging.WARNING, logger="eagle_target_hf"):
        runner = HFTargetRunner(model)
    runner.set_aux_layers(AUX)

    assert runner._proven is not None
    assert runner._proven.execution.layout == layout
    assert ("slower" in caplog.text) == (layout == "equal")
    with torch.no_grad():
        alone = [
            model.model(input_ids=ids[None]).last_hidden_state[0] for ids in torch.split(input_ids, list(seq_lens))
        ]
    given = runner.forward_eagle3(input_ids, seq_lens).last_hidden_states
    torch.testing.assert_close(given, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_last_hidden_states_narrower_than_the_layers_are_refused() -> None:
    _, config = tiny.LAYOUTS["opt"]
    narrow = transformers.OPTConfig(**{**config().to_dict(), "word_embed_proj_dim": 16})

    with pytest.raises(AdapterError, match=r"no last hidden states of width 32 \(model.*\[1, 8, 16\]"):
        HFTargetRunner(transformers.OPTForCausalLM(narrow))


def test_longrope_factors_do_not_depend_on_the_neighbours() -> None:
    """A short sequence in a batch with a long one would get the long factors from transformers."""
    model = tiny.build("phi3-longrope")
    runner = HFTargetRunner(model)
    runner.set_aux_layers(AUX)
    assert runner._proven is not None
    assert runner._proven.execution.architecture.length_boundary == 8
    long = 9
    input_ids, seq_lens = tiny.random_request(4, long)

    given = runner.forward_eagle3(input_ids, seq_lens).last_hidden_states

    assert long < FORWARD_COST
    _, last, _ = tiny.oracle(model, input_ids, seq_lens, AUX)
    torch.testing.assert_close(given, last, atol=1e-5, rtol=1e-5)
    together = model.model(input_ids=torch.stack([torch.cat([input_ids[:4], input_ids[4:][:5]]), input_ids[4:]]))
    assert not torch.allclose(together.last_hidden_state[0, :4], last[:4], atol=1e-3)
