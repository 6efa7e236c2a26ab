"""What layers return is captured, or refused at load: never found out by the first request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from eagle_target_hf import HFEagle3TargetModel, HFTargetRunner
from transformers.modeling_outputs import BaseModelOutputWithPast

from eagle_target.errors import AdapterError

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

AUX = (0, 2, 3)


class Wrapped(torch.nn.Module):
    """A decoder layer that returns its hidden states in another form."""

    def __init__(self, layer: torch.nn.Module, form: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = layer
        self.form = form

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None, **kwargs: Any) -> Any:
        hidden = hidden if residual is None else hidden + residual
        return self.form(self.layer(hidden, **kwargs), hidden)


class Loop(transformers.LlamaModel):  # type: ignore[misc]
    """A Llama whose loop over its layers takes what `Wrapped` gives."""

    norms_by_hand = False
    skipped: tuple[int, ...] = ()
    scale = 1.0
    taken = 0

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        state: Any = (self.embed_tokens(input_ids),)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(state[0], position_ids)
        for number, layer in enumerate(self.layers):
            if number in self.skipped:
                continue
            output = layer(*state, attention_mask=None, position_embeddings=rotary)
            if isinstance(output, dict):
                output = output.get("last_hidden_state", output.get("hidden_states"))
            if isinstance(output, tuple | list) and not is_pair(output):
                output = output[self.taken]
            state = output if is_pair(output) else (self.scale * output,)
        hidden = sum(state[1:], start=state[0])
        if self.norms_by_hand:
            hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.norm.variance_epsilon)
            return BaseModelOutputWithPast(last_hidden_state=hidden * self.norm.weight)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def is_pair(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) == 2 and output[1] is not None


def looped(form: Callable[[torch.Tensor, torch.Tensor], Any] | None = None, **attributes: Any) -> Any:
    model = tiny.build("llama")
    decoder = Loop(model.config)
    decoder.load_state_dict(model.model.state_dict())
    decoder.__dict__.update(attributes)
    if form is not None:
        decoder.layers = torch.nn.ModuleList(Wrapped(layer, form) for layer in decoder.layers)
    model.model = decoder.eval()
    return model


@pytest.mark.parametrize(
    "form",
    [
        lambda hidden, _: hidden,
        lambda hidden, _: (hidden,),
        lambda hidden, _: (hidden, None),
        lambda hidden, _: [hidden, None],
        lambda hidden, _: {"attentions": None, "hidden_states": hidden},
        lambda hidden, _: BaseModelOutputWithPast(last_hidden_state=hidden),
    ],
    ids=["bare", "tuple", "tuple with nothing", "list", "dict", "model output"],
)
@pytest.mark.parametrize("norms_by_hand", [False, True])
def test_hidden_states_are_captured_in_whatever_form_a_layer_returns_them(
    form: Callable[[torch.Tensor, torch.Tensor], Any], norms_by_hand: bool
) -> None:
    runner = HFTargetRunner(looped(form, norms_by_hand=norms_by_hand))
    runner.set_aux_layers(AUX)
    ids, lengths = tiny.random_request(5, 11, 2)

    forward = runner.forward_eagle3(ids, lengths)

    aux, last, _ = tiny.oracle(tiny.build("llama"), ids, lengths, AUX)
    torch.testing.assert_close(forward.aux_hidden_states, aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward.last_hidden_states, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "attributes", "says"),
    [
        (lambda hidden, entered: (hidden - entered, entered), {}, "the final norm takes"),
        (lambda hidden, _: hidden, {"scale": 0.5}, "the model goes on with"),
        (lambda hidden, _: ({}, hidden, None), {"taken": 1}, r"returns dict, expected \[1, 8, 32\]"),
        (
            lambda hidden, _: (hidden.transpose(0, 1), hidden, None),
            {"taken": 1},
            r"returns \[8, 1, 32\], expected \[1, 8, 32\]",
        ),
        (lambda hidden, _: (hidden.mean(1), hidden, None), {"taken": 1}, r"returns \[1, 32\], expected \[1, 8, 32\]"),
    ],
    ids=["a part and the rest", "scaled outside", "nothing first", "tokens before rows", "another shape first"],
)
def test_what_is_not_the_hidden_states_is_refused_at_load(
    form: Callable[[torch.Tensor, torch.Tensor], Any], attributes: dict[str, Any], says: str
) -> None:
    with pytest.raises(AdapterError, match=says):
        HFEagle3TargetModel(looped(form, **attributes), AUX)


def test_a_layer_that_does_not_run_is_refused_where_it_is_asked_for() -> None:
    runner = HFTargetRunner(looped(skipped=(2,)))

    with pytest.raises(AdapterError, match="does not run layer 2"):
        runner.set_aux_layers((0, 2, 3))
    runner.set_aux_layers((0, 1, 3))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        (
            "Gemma3n",
            {
                "layer_types": ["sliding_attention", "full_attention"] * 4,
                "num_kv_shared_layers": 2,
                "activation_sparsity_pattern": [0.0] * 8,
                "laurel_rank": 8,
                "intermediate_size": [48] * 8,
                "vocab_size_per_layer_input": tiny.VOCAB,
                "hidden_size_per_layer_input": 8,
            },
            r"Gemma3nTextDecoderLayer returns \[4, 1, 8, 32\]",
        ),
        (
            "HYV4",
            {"num_key_value_heads": 4, "num_experts": 4, "moe_intermediate_size": 16, "pad_token_id": 0},
            r"HYV4DecoderLayer returns \[1, 8, 4, 32\]",
        ),
    ],
)
def test_architectures_with_more_than_one_stream_are_refused_at_load(
    name: str, values: dict[str, Any], says: str
) -> None:
    sizes = {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "head_dim": 8,
    }
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = config_class(
        **{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, **values}
    )

    with pytest.raises(AdapterError, match=says):
        HFTargetRunner(getattr(transformers, f"{name}ForCausalLM")(config))


def test_numbers_that_are_not_finite_are_refused_at_load() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")

    with pytest.raises(AdapterError, match=r"not finite in torch.float32"):
        HFTargetRunner(model)


def test_the_proof_leaves_no_hook_behind() -> None:
    model = tiny.build("llama")
    HFTargetRunner(model)

    assert not any(module._forward_hooks for module in model.modules())
