"""The head's replay, its fallback to the model's own logits, and the draft's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from eagle_target_hf import HFEagle3TargetModel, HFTargetRunner

from eagle_target import VocabMapping
from eagle_target.errors import AdapterError, ContractError

from . import tiny

AUX = (0, 2, 3)


class BiasedByInput(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Logits that no function of the last hidden states gives: the token at hand is made unlikely."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits.scatter_add(
            2, input_ids[..., None], torch.full_like(output.logits[..., :1], -3.0)
        )
        return output


class Sharpened(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Something after the head that the config does not tell, though a function of the last hidden states."""

    def forward(self, **kwargs: Any) -> Any:
        output = super().forward(**kwargs)
        output.logits = output.logits * 1.5 + 0.25
        return output


def build(model_class: Any) -> Any:
    model = model_class(tiny.LAYOUTS["llama"][1]())
    model.load_state_dict(tiny.build("llama").state_dict())
    return model.eval()


def test_head_that_cannot_be_replayed_falls_back_to_own_logits() -> None:
    model = build(BiasedByInput)
    with pytest.warns(UserWarning, match="BiasedByInput cannot be replayed"):
        runner = HFTargetRunner(model)
    runner.set_aux_layers(AUX)
    input_ids, seq_lens = tiny.random_request(5, 9, 2, 5)

    forward = runner.forward_eagle3(input_ids, seq_lens)

    aux, last, logits = tiny.oracle(model, input_ids, seq_lens, AUX)
    torch.testing.assert_close(forward.aux_hidden_states, aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward.last_hidden_states, last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward.logits, logits, atol=1e-5, rtol=1e-5)
    assert runner.draft_head(torch.tensor([1, 2])) is None
    with pytest.raises(AdapterError, match="BiasedByInput"):
        runner.compute_logits(last)


def test_fallback_reaches_the_batch_and_refuses_hidden() -> None:
    model = build(BiasedByInput)
    mapping = VocabMapping.from_ids(torch.tensor([50, 4, 9, 80]), tiny.VOCAB)
    input_ids, _ = tiny.random_request(10)
    ones = torch.ones(1, 10, dtype=torch.int64)
    with pytest.warns(UserWarning, match="BiasedByInput"):
        target = HFEagle3TargetModel(model, AUX)
    target.set_vocab_mapping(mapping)

    probs = target.generate_batch(input_ids[None], ones, ones).target_probs

    _, _, logits = tiny.oracle(model, input_ids, (10,), AUX)
    assert probs is not None
    expected = torch.softmax(logits[1:, mapping.selected_token_ids], dim=-1)
    torch.testing.assert_close(probs[0, :-1], expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="BiasedByInput"):
        hidden = HFEagle3TargetModel(model, AUX, encoding="hidden")
    with pytest.raises(ContractError, match="plain LM head"):
        hidden.set_vocab_mapping(mapping)


def test_unknown_head_is_replayed_and_has_no_plain_rows() -> None:
    model = build(Sharpened)
    runner = HFTargetRunner(model)
    input_ids, seq_lens = tiny.random_request(5)

    _, last, logits = tiny.oracle(model, input_ids, seq_lens, AUX)

    torch.testing.assert_close(runner.compute_logits(last), logits, atol=1e-5, rtol=1e-5)
    assert runner.draft_head(torch.tensor([1, 2])) is None


def test_soft_cap_of_the_config_that_the_model_ignores_is_not_believed() -> None:
    model = tiny.build("llama")
    model.config.final_logit_softcapping = 5.0
    with torch.no_grad():
        model.model.norm.weight.fill_(1e-3)

    head = HFTargetRunner(model).draft_head(torch.tensor([1, 2]))

    assert head is not None
    assert head.soft_cap is None


def test_quantised_head_has_no_plain_rows() -> None:
    model = tiny.build("llama")

    class QuantisedLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.scale = linear.weight.detach().abs().amax(1) / 127
            self.register_buffer("weight", (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ (self.get_buffer("weight").float() * self.scale[:, None]).T

    model.lm_head = QuantisedLinear(model.lm_head)
    runner = HFTargetRunner(model)
    input_ids, seq_lens = tiny.random_request(5)

    _, last, logits = tiny.oracle(model, input_ids, seq_lens, AUX)

    torch.testing.assert_close(runner.compute_logits(last), logits, atol=1e-5, rtol=1e-5)
    assert runner.draft_head(torch.tensor([1, 2])) is None


def test_bias_comes_with_the_rows() -> None:
    head = HFTargetRunner(tiny.build("phi-bias")).draft_head(torch.tensor([7, 3]))

    assert head is not None
    assert head.bias is not None
    assert head.bias.shape == (2,)


def test_bfloat16_soft_cap_form_is_proven() -> None:
    head = HFTargetRunner(tiny.build("gemma2").to(torch.bfloat16)).draft_head(torch.tensor([7, 3]))

    assert head is not None
    assert (head.soft_cap, head.weight.dtype) == (5.0, torch.bfloat16)
