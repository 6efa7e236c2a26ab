"""The tiny targets that plugin authors test with."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from eagle_target.errors import AdapterError
from eagle_target.testing.tiny import EmbeddingRunner, save_tiny_target

if TYPE_CHECKING:
    from pathlib import Path


def ids_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(211, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_is_the_same_every_time_and_leaves_the_generator_alone(tmp_path: Path, tied: bool) -> None:
    state = torch.get_rng_state()
    first = load_file(save_tiny_target(tmp_path / "a", tied=tied) / "model.safetensors")
    second = load_file(save_tiny_target(str(tmp_path / "b"), tied=tied) / "model.safetensors")
    other = load_file(save_tiny_target(tmp_path / "c", tied=tied, seed=1) / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert ("lm_head.weight" in first) == (not tied)
    assert first["model.embed_tokens.weight"].shape == (211, 64)


def test_checkpoint_has_the_sizes_asked_for(tmp_path: Path) -> None:
    path = save_tiny_target(tmp_path, layers=3, hidden=32, heads=2, kv_heads=1, vocab=97, dtype="bfloat16")
    config = json.loads((path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (3, 32, 97)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_has_clear_winners(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(save_tiny_target(tmp_path, tied=tied))
    ids = ids_of(400).view(8, 50)
    with torch.no_grad():
        best = model(ids).logits.topk(2)
    margins = best.values[..., 0] - best.values[..., 1]
    assert float(margins.min()) > 1e-4
    assert float(margins.median()) > 0.1
    assert best.indices[..., 0].unique().numel() > 50
    assert float((best.indices[..., 0] == ids).float().mean()) < 0.1


def test_embedding_runner_is_the_same_for_the_same_seed() -> None:
    first, second = (EmbeddingRunner().forward_eagle3(ids_of(9), [4, 5]) for _ in range(2))
    other = EmbeddingRunner(seed=1).forward_eagle3(ids_of(9), [4, 5])
    assert torch.equal(first.aux_hidden_states, second.aux_hidden_states)
    assert torch.equal(first.last_hidden_states, second.last_hidden_states)
    assert not torch.equal(first.last_hidden_states, other.last_hidden_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_runner_gives_the_same_bits_whatever_shares_the_forward(dtype: torch.dtype) -> None:
    runner = EmbeddingRunner(dtype=dtype)
    lens = [1, 7, 30, 2, 111]
    joined = runner.forward_eagle3(ids_of(sum(lens)), lens)
    for ids, aux, last in zip(
        torch.split(ids_of(sum(lens)), lens),
        torch.split(joined.aux_hidden_states, lens),
        torch.split(joined.last_hidden_states, lens),
        strict=True,
    ):
        alone = runner.forward_eagle3(ids, [len(ids)])
        assert torch.equal(alone.aux_hidden_states, aux)
        assert torch.equal(alone.last_hidden_states, last)
        assert aux.dtype == last.dtype == dtype
        logits = runner.compute_logits(last)
        assert logits.dtype == dtype
        again = torch.split(runner.compute_logits(joined.last_hidden_states), lens)
        assert torch.equal(again[lens.index(len(ids))], logits)


def test_embedding_runner_is_causal_and_sees_order() -> None:
    runner = EmbeddingRunner()
    ids = ids_of(20)
    whole = runner.forward_eagle3(ids, [20]).last_hidden_states
    torch.testing.assert_close(runner.forward_eagle3(ids[:11], [11]).last_hidden_states, whole[:11])
    swapped = ids.clone()
    swapped[[3, 8]] = ids[[8, 3]]
    changed = runner.forward_eagle3(swapped, [20]).last_hidden_states
    assert torch.equal(changed[:3], whole[:3])
    assert bool(((changed - whole).abs().amax(1) > 1e-4)[3:].all())


def test_embedding_runner_captures_the_layers_asked_for() -> None:
    runner = EmbeddingRunner()
    assert runner.aux_layer_ids == (1, 3, 4)
    runner.set_aux_layers([5, 0, 7])
    forward = runner.forward_eagle3(ids_of(6), [6])
    low, middle, high = forward.aux_hidden_states.chunk(3, dim=1)
    assert torch.equal(high, forward.last_hidden_states)
    assert not torch.equal(low, middle)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"logit_scale": 0.3, "soft_cap": 2.0, "bias": True}])
def test_embedding_runner_has_a_plain_head(options: dict[str, float]) -> None:
    runner = EmbeddingRunner(**options)  # type: ignore[arg-type]
    hidden = runner.forward_eagle3(ids_of(9), [9]).last_hidden_states
    ids = torch.tensor([200, 3, 77])
    head = runner.draft_head(ids)
    assert head is not None
    torch.testing.assert_close(head.compute_logits(hidden), runner.compute_logits(hidden)[:, ids])
    assert EmbeddingRunner(plain_head=False).draft_head(ids) is None
    assert runner.input_embedding_weight().shape == (211, 16)


def test_embedding_runner_records_forwards_and_refuses_after_close() -> None:
    runner = EmbeddingRunner(num_layers=3, max_seq_len=5)
    assert runner.aux_layer_ids == (0, 1, 2)
    assert runner.info.max_seq_len == 5
    runner.forward_eagle3(ids_of(5), [2, 3])
    assert runner.forwards == [(2, 3)]
    runner.close()
    runner.close()
    assert runner.closed
    with pytest.raises(AdapterError, match="closed"):
        runner.forward_eagle3(ids_of(5), [5])


def test_embedding_runner_refuses_two_threads_at_once() -> None:
    runner = EmbeddingRunner(delay=0.3)
    thread = threading.Thread(target=runner.forward_eagle3, args=(ids_of(5), [5]))
    thread.start()
    while not runner.forwards:
        pass
    with pytest.raises(AdapterError, match="two threads"):
        runner.forward_eagle3(ids_of(5), [5])
    thread.join()
    assert len(runner.forward_eagle3(ids_of(5), [5]).last_hidden_states) == 5
