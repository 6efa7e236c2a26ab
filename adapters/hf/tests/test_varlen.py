"""Variable-length flash attention: packed rows, with a reference kernel here and a real one on a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_hf import HFTargetRunner
from transformers import AttentionInterface, AttentionMaskInterface

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

AUX = (0, 2, 3)
KERNEL = "flash_varlen_reference"


def varlen_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What a variable-length kernel does: each stretch of `cu_seq_lens_q` is its own causal context."""
    ends = kwargs.get("cu_seq_lens_q")
    bounds = [0, query.shape[2]] if ends is None else ends.tolist()
    parts = []
    for start, end in pairwise(bounds):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture
def kernel() -> Iterator[str]:
    AttentionInterface.register(KERNEL, varlen_attention)
    AttentionMaskInterface.register(KERNEL, lambda **kwargs: None)
    yield KERNEL
    AttentionInterface._global_mapping.pop(KERNEL)
    AttentionMaskInterface._global_mapping.pop(KERNEL)


def build(layout: str, kernel: str) -> Any:
    model = tiny.build(layout)
    # Set afterwards: transformers takes an unknown name with `flash` in it for a kernel on the hub.
    model.config._attn_implementation_internal = kernel
    return model


@pytest.mark.parametrize("layout", ["llama", "qwen3", "phi3-longrope", "qwen3-moe"])
def test_packed_rows_give_what_sequences_give_alone(layout: str, kernel: str) -> None:
    runner = HFTargetRunner(build(layout, kernel), max_batch_tokens=24)
    runner.set_aux_layers(AUX)
    input_ids, seq_lens = tiny.random_request(5, 11, 2, 7, 7, 30)

    forward = runner.forward_eagle3(input_ids, seq_lens)

    assert runner._proven is not None
    assert runner._proven.execution.layout == "packed"
    aux, last, _ = tiny.oracle(tiny.build(layout), input_ids, seq_lens, AUX)
    torch.testing.assert_close(forward.aux_hidden_states, aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward.last_hidden_states, last, atol=1e-5, rtol=1e-5)


def test_model_that_mixes_packed_sequences_is_padded_instead(kernel: str) -> None:
    runner = HFTargetRunner(build("lfm2-hybrid", kernel))
    runner.set_aux_layers(AUX)
    input_ids, seq_lens = tiny.random_request(5, 11, 2)

    forward = runner.forward_eagle3(input_ids, seq_lens)

    assert runner._proven is not None
    assert runner._proven.execution.layout == "padded"
    _, last, _ = tiny.oracle(tiny.build("lfm2-hybrid"), input_ids, seq_lens, AUX)
    torch.testing.assert_close(forward.last_hidden_states, last, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_flash_attention_2_packs() -> None:
    model = tiny.build("llama", attn_implementation="flash_attention_2").to("cuda", torch.bfloat16)
    runner = HFTargetRunner(model)
    runner.set_aux_layers(AUX)
    input_ids, seq_lens = tiny.random_request(5, 11, 2, 30)

    forward = runner.forward_eagle3(input_ids, seq_lens)

    assert runner._proven is not None
    assert runner._proven.execution.layout == "packed"
    _, last, _ = tiny.oracle(tiny.build("llama"), input_ids, seq_lens, AUX)
    assert (forward.last_hidden_states.cpu().float() - last).norm() / last.norm() < 0.05
