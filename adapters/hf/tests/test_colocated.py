"""Batches of HFEagle3TargetModel against an explicit loop over rows, documents and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_hf import HFEagle3TargetModel

from eagle_target import Eagle3TargetBatch, VocabMapping
from eagle_target.errors import AdapterError, ContractError

from . import tiny

if TYPE_CHECKING:
    from eagle_target.contract.request import Encoding

AUX = (0, 2, 3)
SEQ = 12
SELECTED = torch.randperm(tiny.VOCAB, generator=torch.Generator().manual_seed(4))[:48]
# Documents of each row as (first position, tokens); everything else is padding.
ROWS: dict[str, list[list[tuple[int, int]]]] = {
    "right-padded": [[(0, 12)], [(0, 7)], [(0, 1)]],
    "left-padded": [[(0, 12)], [(5, 7)], [(11, 1)]],
    "packed": [[(0, 5), (5, 4), (9, 3)], [(0, 1), (1, 8)], [(0, 12)]],
}


def trainer_rows(spans: list[list[tuple[int, int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (len(spans), SEQ)
    input_ids = torch.randint(3, tiny.VOCAB - 1, shape, generator=generator)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, documents in enumerate(spans):
        for first, length in documents:
            attention_mask[row, first : first + length] = 1
    loss_mask = torch.randint(0, 2, shape, generator=generator) * attention_mask
    return input_ids * attention_mask, attention_mask, loss_mask


def seq_lens_of(rows: str) -> list[list[int]] | None:
    return [[length for _, length in documents] for documents in ROWS[rows]] if rows == "packed" else None


def check_batch(batch: Eagle3TargetBatch, model: Any, rows: str, mapping: VocabMapping) -> None:
    """Position t bears the supervision of t + 1, within its document, where the loss mask asks for it."""
    input_ids, _, loss_mask = trainer_rows(ROWS[rows])
    assert batch.target_probs is not None
    assert batch.position_mask is not None
    shape = (len(input_ids), SEQ)
    aux = torch.zeros(*shape, 3 * tiny.HIDDEN)
    probs = torch.zeros(*shape, mapping.draft_vocab_size)
    in_draft = torch.zeros(*shape, 1, dtype=torch.bool)
    shifted_ids, shifted_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, documents in enumerate(ROWS[rows]):
        for first, length in documents:
            ids = input_ids[row, first : first + length]
            hidden, _, logits = tiny.oracle(model, ids, (length,), AUX)
            aux[row, first : first + length] = hidden
            for t in range(length - 1):
                shifted_ids[row, first + t] = ids[t + 1]
                shifted_mask[row, first + t] = loss_mask[row, first + t + 1]
                if shifted_mask[row, first + t]:
                    probs[row, first + t] = torch.softmax(logits[t + 1, mapping.selected_token_ids], dim=-1)
                    in_draft[row, first + t] = mapping.selected_token_mask[logits[t + 1].argmax()]
    torch.testing.assert_close(batch.aux_hidden_states, aux, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.target_probs, probs, atol=1e-5, rtol=1e-5)
    assert torch.equal(batch.position_mask, in_draft)
    assert torch.equal(batch.input_ids, shifted_ids)
    assert torch.equal(batch.loss_mask, shifted_mask)
    assert in_draft.any()


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", ["llama", "gemma2", "gpt2"])
def test_batch_equals_an_explicit_loop(layout: str, rows: str, encoding: Encoding) -> None:
    model = tiny.build(layout)
    mapping = VocabMapping.from_ids(SELECTED, tiny.VOCAB)
    with HFEagle3TargetModel(model, (3, 0, 2), encoding=encoding, max_batch_tokens=20) as target:
        target.set_vocab_mapping(mapping)

        batch = target.generate_batch(*trainer_rows(ROWS[rows]), seq_lens=seq_lens_of(rows))

    check_batch(batch, model, rows, mapping)


def test_batch_can_be_trained_on() -> None:
    target = HFEagle3TargetModel(tiny.build("llama"), AUX, encoding="logits")
    weight = torch.ones(3 * tiny.HIDDEN, requires_grad=True)

    batch = target.generate_batch(*trainer_rows(ROWS["packed"]), seq_lens=seq_lens_of("packed"))
    torch.autograd.backward((batch.aux_hidden_states @ weight).sum())

    assert weight.grad is not None


def test_default_layers_of_a_shallow_target_are_refused() -> None:
    with pytest.raises(ContractError, match="too shallow"):
        HFEagle3TargetModel(tiny.build("llama"))


def test_sequence_over_the_model_s_positions_is_refused() -> None:
    target = HFEagle3TargetModel(tiny.build("gpt2"), AUX, encoding="logits")
    ids = torch.full((1, 65), 5)

    with pytest.raises(ContractError, match="65 tokens, the target takes 64"):
        target.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids))


def test_embedding_is_the_target_s() -> None:
    model = tiny.build("llama")

    assert torch.equal(HFEagle3TargetModel(model, AUX).input_embedding_weight(), model.model.embed_tokens.weight)


@pytest.mark.parametrize("layout", ["llama", "llama-tied", "gemma2"])
def test_training_a_draft_s_embedding_does_not_move_the_target(layout: str) -> None:
    model = tiny.build(layout)
    rows = trainer_rows(ROWS["right-padded"])
    target = HFEagle3TargetModel(model, AUX, encoding="logits")
    before, weights = target.generate_batch(*rows), {name: p.clone() for name, p in model.state_dict().items()}
    draft = torch.nn.Embedding(tiny.VOCAB, tiny.HIDDEN)
    draft.weight = target.get_input_embeddings().weight
    # Gemma multiplies what it looks up, which is not in the weight.
    assert torch.equal(draft.weight, model.model.embed_tokens.weight)

    optimizer = torch.optim.SGD(draft.parameters(), lr=1.0)
    torch.autograd.backward(draft(rows[0]).square().sum())
    optimizer.step()

    assert not torch.equal(draft.weight, model.model.embed_tokens.weight)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    after = target.generate_batch(*rows)
    assert all(torch.equal(after.tensors()[name], tensor) for name, tensor in before.tensors().items())


def test_an_embedding_that_is_quantised_is_not_given() -> None:
    model = tiny.build("llama")
    target = HFEagle3TargetModel(model, AUX)
    weight = torch.nn.Parameter(model.model.embed_tokens.weight.to(torch.int8), requires_grad=False)
    model.model.embed_tokens.weight = weight

    with pytest.raises(AdapterError, match=r"is \[97, 32\] of torch.int8, expected \[97, 32\]"):
        target.get_input_embeddings()


def test_close_twice_leaves_the_user_s_model() -> None:
    model = tiny.build("llama")
    target = HFEagle3TargetModel(model, AUX, encoding="logits")
    rows = trainer_rows(ROWS["packed"])

    target.close()
    target.close()

    with pytest.raises(AdapterError, match="closed"):
        target.generate_batch(*rows)
    model(input_ids=rows[0])
