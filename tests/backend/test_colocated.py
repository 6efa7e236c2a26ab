"""The target in the trainer's own process."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle_target.colocated import PretrainedEagle3TargetModel, RunnerEagle3TargetModel
from eagle_target.contract.runner import TargetForward
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import AdapterError, ConfigError, ContractError, VocabMappingError
from eagle_target.plugins.adapter import Adapter
from eagle_target.plugins.options import PluginOptions
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from tests.compute.layouts import LAYOUTS, mask_of, packed_masks, padded_masks
from tests.oracle import assert_matches, oracle_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.request import Encoding, RowPolicy

VOCAB = 53
MAPPING = shuffled_mapping(VOCAB, 20)
HEAD = {"vocab_size": VOCAB, "bias": True, "logit_scale": 0.5, "soft_cap": 4.0}
ENCODINGS: tuple[Encoding, ...] = ("probs", "hidden", "logits")
POLICIES: tuple[RowPolicy, ...] = ("supervised", "all")
REFERENCE = EmbeddingRunner(**HEAD)  # type: ignore[arg-type]

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def full_forward(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    forward = REFERENCE.forward_eagle3(torch.tensor(ids), [len(ids)])
    return forward.aux_hidden_states, REFERENCE.compute_logits(forward.last_hidden_states)


def target_of(mapping: VocabMapping | None = MAPPING, **options: Any) -> RunnerEagle3TargetModel:
    runner = options.pop("runner", None) or EmbeddingRunner(**HEAD)  # type: ignore[arg-type]
    target = RunnerEagle3TargetModel(runner, **options)
    if mapping is not None:
        target.set_vocab_mapping(mapping)
    return target


def runner_of(target: RunnerEagle3TargetModel) -> EmbeddingRunner:
    assert isinstance(target.runner, EmbeddingRunner)
    return target.runner


def rows_for(mask: torch.Tensor, seed: int = 0) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, mask.shape, generator=draw), mask, torch.randint(2, mask.shape, generator=draw)


def check_against_oracle(
    target: RunnerEagle3TargetModel,
    rows: Rows,
    seq_lens: list[list[int]] | None,
    encoding: Encoding,
    policy: RowPolicy,
) -> None:
    batch = target.generate_batch(*rows, seq_lens=seq_lens)
    selected = MAPPING.selected_token_ids.tolist()
    expected = oracle_batch(
        full_forward, *rows, selected_token_ids=selected, seq_lens=seq_lens, rows=policy, encoding=encoding
    )
    assert_matches(batch.tensors(), expected)


PADDED = rows_for(mask_of("111110", "011111"))


# Values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("policy", POLICIES)
def test_batch_is_the_oracles(layout: str, encoding: Encoding, policy: RowPolicy) -> None:
    mask, seq_lens = LAYOUTS[layout]
    with target_of(encoding=encoding, rows=policy) as target:
        check_against_oracle(target, rows_for(mask), seq_lens, encoding, policy)


@given(padded_masks(), st.sampled_from(ENCODINGS), st.sampled_from(POLICIES), st.integers(0, 99))
def test_any_padded_batch_is_the_oracles(mask: torch.Tensor, encoding: Encoding, policy: RowPolicy, seed: int) -> None:
    with target_of(encoding=encoding, rows=policy) as target:
        check_against_oracle(target, rows_for(mask, seed), None, encoding, policy)


@given(packed_masks(), st.sampled_from(ENCODINGS), st.sampled_from(POLICIES), st.integers(0, 99))
def test_any_packed_batch_is_the_oracles(
    packed: tuple[torch.Tensor, list[list[int]]], encoding: Encoding, policy: RowPolicy, seed: int
) -> None:
    mask, seq_lens = packed
    with target_of(encoding=encoding, rows=policy) as target:
        check_against_oracle(target, rows_for(mask, seed), seq_lens, encoding, policy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encodings_probs_and_hidden_are_one_supervision(layout: str) -> None:
    mask, seq_lens = LAYOUTS[layout]
    probs = target_of(encoding="probs").generate_batch(*rows_for(mask), seq_lens=seq_lens)
    hidden = target_of(encoding="hidden").generate_batch(*rows_for(mask), seq_lens=seq_lens)
    assert_matches(hidden.tensors(), probs.tensors(), atol=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pads_do_not_change_values(encoding: Encoding) -> None:
    target = target_of(encoding=encoding, rows="all")
    ids, mask, loss = rows_for(mask_of("1111"))
    plain = target.generate_batch(ids, mask, loss).tensors()
    for left, right in [(0, 3), (3, 0), (2, 1)]:
        padded = [torch.nn.functional.pad(tensor, (left, right)) for tensor in (ids, mask, loss)]
        wide = target.generate_batch(*padded).tensors()
        for name, tensor in plain.items():
            torch.testing.assert_close(wide[name][:, left : left + 4], tensor)
            assert not wide[name][:, :left].any()
            assert not wide[name][:, left + 4 :].any()


def test_documents_of_a_packed_row_are_rows_of_their_own() -> None:
    target = target_of()
    ids, mask, loss = rows_for(mask_of("1" * 9))
    packed = target.generate_batch(ids, mask, loss, seq_lens=[[4, 2, 3]]).tensors()
    start = 0
    for length in (4, 2, 3):
        span = slice(start, start + length)
        alone = target.generate_batch(ids[:, span], mask[:, span], loss[:, span]).tensors()
        for name, tensor in alone.items():
            torch.testing.assert_close(packed[name][:, span], tensor)
        start += length


def test_mapping_order_is_the_order_of_the_probabilities() -> None:
    ascending = VocabMapping.from_ids(MAPPING.selected_token_ids.sort().values, VOCAB)
    order = MAPPING.selected_token_ids.argsort()
    shuffled, sorted_ = (target_of(mapping).generate_batch(*PADDED) for mapping in (MAPPING, ascending))
    assert shuffled.target_probs is not None
    assert sorted_.target_probs is not None
    torch.testing.assert_close(shuffled.target_probs[..., order], sorted_.target_probs)
    assert shuffled.position_mask is not None
    assert sorted_.position_mask is not None
    assert torch.equal(shuffled.position_mask, sorted_.position_mask)


def test_whole_vocabulary_supervises_every_row_that_bears_loss() -> None:
    batch = target_of(VocabMapping.identity(VOCAB)).generate_batch(*PADDED)
    assert batch.position_mask is not None
    assert torch.equal(batch.position_mask[..., 0], batch.loss_mask.bool())


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_have_the_dtype_asked_for(encoding: Encoding, dtype: torch.dtype) -> None:
    batch = target_of(encoding=encoding, probs_dtype=dtype).generate_batch(*PADDED)
    exact = target_of(encoding=encoding).generate_batch(*PADDED)
    assert batch.target_probs is not None
    assert exact.target_probs is not None
    assert torch.equal(batch.target_probs, exact.target_probs.to(dtype))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hidden_states_keep_the_targets_dtype(encoding: Encoding) -> None:
    runner = EmbeddingRunner(vocab_size=VOCAB, dtype=torch.bfloat16)
    tensors = target_of(runner=runner, encoding=encoding).generate_batch(*PADDED).tensors()
    assert tensors["aux_hidden_states"].dtype == torch.bfloat16
    assert tensors["target_logsumexp"].dtype == torch.float32
    if encoding == "logits":
        assert tensors["logits"].dtype == torch.bfloat16
    else:
        assert tensors["target_probs"].dtype == torch.float32


@pytest.mark.parametrize("mapping", [VocabMapping.identity(VOCAB), shuffled_mapping(VOCAB, VOCAB)], ids=repr)
def test_a_draft_of_the_whole_vocabulary_gets_the_same_from_hidden_states(mapping: VocabMapping) -> None:
    expected = target_of(mapping).generate_batch(*PADDED).tensors()
    made = target_of(mapping, encoding="hidden").generate_batch(*PADDED).tensors()
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor)


def test_inputs_are_left_alone() -> None:
    copies = [tensor.clone() for tensor in PADDED]
    target_of().generate_batch(*PADDED)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(PADDED, copies, strict=True))


# Layers


def test_layers_are_the_default_or_those_asked_for() -> None:
    assert runner_of(target_of()).aux_layer_ids == (1, 3, 4)
    target = target_of(aux_layer_ids=[6, 0, 2])
    assert target.aux_layer_ids == runner_of(target).aux_layer_ids == (0, 2, 6)
    expected = EmbeddingRunner(**HEAD)  # type: ignore[arg-type]
    expected.set_aux_layers([0, 2, 6])
    aux = expected.forward_eagle3(PADDED[0][0, :5], [5]).aux_hidden_states
    torch.testing.assert_close(target.generate_batch(*PADDED).aux_hidden_states[0, :5], aux)


def test_layers_the_target_has_not_are_refused() -> None:
    with pytest.raises(ContractError, match="has 8, but the target has layers 0 to 7"):
        target_of(aux_layer_ids=[0, 1, 8])
    with pytest.raises(ContractError, match="too shallow"):
        target_of(runner=EmbeddingRunner(vocab_size=VOCAB, num_layers=4))


# The mapping


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_mapping_is_taken_in_every_form(encoding: Encoding) -> None:
    expected = target_of(encoding=encoding).generate_batch(*PADDED)
    tensors, ids = target_of(None, encoding=encoding), target_of(None, encoding=encoding)
    tensors.set_vocab_mapping(MAPPING.selected_token_ids, MAPPING.selected_token_mask)
    ids.set_vocab_mapping(MAPPING.selected_token_ids)  # type: ignore[call-overload]
    for target in (tensors, ids):
        assert_same_batch(target.generate_batch(*PADDED), expected)


def test_bad_mapping_is_refused_and_the_old_one_stays() -> None:
    target = target_of()
    expected = target.generate_batch(*PADDED)
    with pytest.raises(VocabMappingError, match=f"vocabulary of 54, the target's has {VOCAB}"):
        target.set_vocab_mapping(shuffled_mapping(54, 20))
    with pytest.raises(VocabMappingError, match="disagrees"):
        target.set_vocab_mapping(MAPPING.selected_token_ids, ~MAPPING.selected_token_mask)
    assert_same_batch(target.generate_batch(*PADDED), expected)


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_without_a_mapping_nothing_is_run(encoding: Encoding) -> None:
    target = target_of(None, encoding=encoding)
    with pytest.raises(VocabMappingError, match=f"'{encoding}' needs a vocabulary mapping: call set_vocab_mapping"):
        target.generate_batch(*PADDED)
    assert runner_of(target).forwards == []


def test_logits_need_no_mapping() -> None:
    assert_same_batch(
        target_of(None, encoding="logits").generate_batch(*PADDED), target_of(encoding="logits").generate_batch(*PADDED)
    )


def test_head_that_is_not_plain_cannot_be_sent_as_hidden_states() -> None:
    runner = EmbeddingRunner(vocab_size=VOCAB, plain_head=False)
    with pytest.raises(
        ContractError, match="needs a plain LM head, which embedding-53x16x8-seed0 has not: use 'probs'"
    ):
        target_of(runner=runner, encoding="hidden")
    target_of(runner=runner, encoding="probs").generate_batch(*PADDED)


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_batches_on_their_way_keep_the_mapping_they_were_asked_with(encoding: Encoding) -> None:
    other = shuffled_mapping(VOCAB, 7, seed=3)
    runner = EmbeddingRunner(delay=0.05, **HEAD)  # type: ignore[arg-type]
    with target_of(runner=runner, encoding=encoding) as target:
        first, second = (target.generate_batch_async(*PADDED) for _ in range(2))
        target.set_vocab_mapping(other)
        third = target.generate_batch_async(*PADDED)
        for handle in (first, second):
            assert_same_batch(handle.result(), target_of(encoding=encoding).generate_batch(*PADDED))
        assert_same_batch(third.result(), target_of(other, encoding=encoding).generate_batch(*PADDED))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": PADDED[0].int()}, "input_ids must be int64"),
        ({"input_ids": PADDED[0] + VOCAB}, "use the target's own tokenizer"),
        ({"attention_mask": PADDED[1][:, 1:]}, "attention_mask is"),
        ({"attention_mask": mask_of("101111", "111111")}, "hole at row 0, position 1"),
        ({"attention_mask": PADDED[1] * 0}, "all zero"),
        ({"loss_mask": PADDED[2] * 3}, "loss_mask has 3"),
        ({"seq_lens": [[3], [3]]}, "adds up to 3"),
        ({"seq_lens": [[2.5, 2.5], [2.5, 2.5]]}, "seq_lens must be integers"),
        ({"seq_lens": [[-1, 6], [5]]}, "negative length"),
        ({"position_ids": PADDED[1] * 7}, "position_ids has 7"),
        ({"doc_remaining": PADDED[1].float()}, "doc_remaining must be integers"),
    ],
)
@pytest.mark.parametrize("method", ["generate_batch", "generate_batch_async"])
def test_bad_rows_are_refused_at_once_and_nothing_is_run(method: str, changes: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("input_ids", "attention_mask", "loss_mask"), PADDED, strict=True)) | changes
    with target_of() as target:
        with pytest.raises(ContractError, match=message):
            getattr(target, method)(**arguments)
        assert runner_of(target).forwards == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "tokens"}, "encoding must be one of"),
        ({"rows": "some"}, "rows must be one of"),
        ({"probs_dtype": torch.float64}, "probs_dtype must be"),
    ],
)
def test_unknown_options_are_refused_and_nothing_is_run(options: dict[str, Any], message: str) -> None:
    runner = EmbeddingRunner(vocab_size=VOCAB)
    with pytest.raises(ContractError, match=message):
        target_of(runner=runner, **options).generate_batch(*PADDED)
    assert runner.forwards == []


def test_too_long_sequence_is_refused_and_nothing_is_run() -> None:
    runner = EmbeddingRunner(vocab_size=VOCAB, max_seq_len=4)
    with pytest.raises(ContractError, match="a sequence has 5 tokens, the target takes 4"):
        target_of(runner=runner).generate_batch(*PADDED)
    assert runner.forwards == []


class BrokenOnce(EmbeddingRunner):
    """Fails the first time."""

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        forward = super().forward_eagle3(input_ids, seq_lens)
        if len(self.forwards) == 1:
            raise AdapterError("the engine is out of memory")
        return forward


def test_engines_error_is_raised_and_the_next_batch_works() -> None:
    with target_of(runner=BrokenOnce(vocab_size=VOCAB)) as target:
        with pytest.raises(AdapterError, match="out of memory"):
            target.generate_batch(*PADDED)
        target.generate_batch(*PADDED)
    with target_of(runner=BrokenOnce(vocab_size=VOCAB)) as target:
        broken, good = (target.generate_batch_async(*PADDED) for _ in range(2))
        with pytest.raises(AdapterError, match="out of memory"):
            broken.result()
        good.result()


def test_engines_output_of_another_shape_is_refused() -> None:
    class Short(EmbeddingRunner):
        def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
            forward = super().forward_eagle3(input_ids, seq_lens)
            return TargetForward(
                aux_hidden_states=forward.aux_hidden_states[:, :32], last_hidden_states=forward.last_hidden_states
            )

    with pytest.raises(ContractError, match=r"gave aux_hidden_states \[10, 32\], expected \[10, 48\]"):
        target_of(runner=Short(vocab_size=VOCAB)).generate_batch(*PADDED)


# Threads, closing


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_waiting_or_not_gives_the_same_bits(encoding: Encoding) -> None:
    with target_of(encoding=encoding) as target:
        assert target.supports_async
        handles = [target.generate_batch_async(*PADDED) for _ in range(3)]
        for handle in handles:
            assert_same_batch(handle.result(timeout=30), target.generate_batch(*PADDED))


def test_many_threads_take_turns() -> None:
    runner = EmbeddingRunner(delay=0.002, **HEAD)  # type: ignore[arg-type]
    results: dict[int, Eagle3TargetBatch] = {}
    with target_of(runner=runner) as target:

        def work(seed: int) -> None:
            results[seed] = target.generate_batch(*rows_for(PADDED[1], seed))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        handles = [target.generate_batch_async(*rows_for(PADDED[1], seed)) for seed in range(8)]
        for thread in threads:
            thread.join()
        for seed, handle in enumerate(handles):
            expected = target_of().generate_batch(*rows_for(PADDED[1], seed))
            assert_same_batch(results[seed], expected)
            assert_same_batch(handle.result(), expected)


def test_closing_twice_is_closing_once() -> None:
    target = target_of()
    target.generate_batch_async(*PADDED).result()
    target.close()
    target.close()
    assert runner_of(target).closed


def test_closed_target_refuses() -> None:
    target = target_of()
    target.close()
    for refused in (
        lambda: target.generate_batch(*PADDED),
        lambda: target.generate_batch_async(*PADDED),
        target.input_embedding_weight,
        lambda: target.set_vocab_mapping(MAPPING),
        lambda: next(target.prefetch([PADDED])),
    ):
        with pytest.raises(AdapterError, match="this target is closed: build a new one"):
            refused()
    assert runner_of(target).forwards == []


def test_closing_waits_for_what_runs_and_cancels_what_waits() -> None:
    runner = EmbeddingRunner(delay=0.2, **HEAD)  # type: ignore[arg-type]
    target = target_of(runner=runner)
    running, *waiting = (target.generate_batch_async(*PADDED) for _ in range(3))
    while not runner.forwards:
        threading.Event().wait(0.001)
    target.close()
    assert running.done()
    assert_same_batch(running.result(), target_of().generate_batch(*PADDED))
    for handle in waiting:
        with pytest.raises(CancelledError):
            handle.result()
    assert len(runner.forwards) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("eagle-target-colocated")]


def test_leaving_the_context_closes() -> None:
    with target_of() as target:
        assert not runner_of(target).closed
    assert runner_of(target).closed


# Facts, and what a trainer does with it


def test_facts_are_plain_data() -> None:
    facts = target_of(encoding="hidden", aux_layer_ids=[0, 1, 2]).model_info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["aux_layer_ids"] == [0, 1, 2]
    assert (facts["vocab_size"], facts["encoding"], facts["transport"]) == (VOCAB, "hidden", "inprocess")
    assert len(facts["fingerprint"]) == 16


def test_input_embedding_is_the_runners() -> None:
    target = target_of()
    assert torch.equal(target.get_input_embeddings().weight, runner_of(target).input_embedding_weight())


def test_the_embedding_seeds_a_draft_that_is_trained_without_moving_the_target() -> None:
    target = target_of()
    before, given = target.generate_batch(*PADDED), runner_of(target).input_embedding_weight().clone()
    draft = torch.nn.Embedding(VOCAB, 16)
    draft.weight = target.get_input_embeddings().weight
    optimizer = torch.optim.SGD(draft.parameters(), lr=1.0)
    torch.autograd.backward(draft(PADDED[0]).square().sum())
    optimizer.step()
    assert not torch.equal(draft.weight, given)
    assert torch.equal(target.get_input_embeddings().weight, given)
    assert_same_batch(target.generate_batch(*PADDED), before)


class WeightsOfAnEngine(EmbeddingRunner):
    """Its embedding is a frozen parameter made under inference mode, of which the last rows and columns are padding."""

    @torch.inference_mode()
    def input_embedding_weight(self) -> torch.Tensor:
        weight = super().input_embedding_weight()
        padded = torch.nn.functional.pad(weight, (0, 3, 0, 11))
        return torch.nn.Parameter(padded, requires_grad=False)[: len(weight), : weight.shape[1]]


def test_an_engines_weight_becomes_a_plain_one_that_can_be_trained() -> None:
    runner = WeightsOfAnEngine(**HEAD)  # type: ignore[arg-type]
    with torch.inference_mode(), torch.device("meta"):
        weight = target_of(runner=runner, mapping=None).get_input_embeddings().weight
    assert (weight.is_leaf, weight.requires_grad, weight.is_inference()) == (True, True, False)
    assert weight.is_contiguous()
    assert weight.untyped_storage().nbytes() == VOCAB * 16 * 4
    torch.autograd.backward(weight.sum())
    assert weight.grad is not None


def test_what_a_call_gave_is_not_given_again() -> None:
    target = target_of()
    first, second = target.input_embedding_weight(), target.input_embedding_weight()
    first.zero_()
    assert second.any()
    assert target.get_input_embeddings().weight.any()


def test_a_batch_is_the_trainers() -> None:
    mask, seq_lens = LAYOUTS["packed"]
    rows, lengths = rows_for(mask), torch.tensor(seq_lens)
    for encoding in ENCODINGS:
        target = target_of(encoding=encoding)
        given = [tensor.clone() for tensor in (*rows, lengths)]
        first = target.generate_batch(*rows, seq_lens=lengths)
        kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
        for tensor in first.tensors().values():
            tensor.zero_()
        assert all(torch.equal(now, then) for now, then in zip((*rows, lengths), given, strict=True))
        again = target.generate_batch(*rows, seq_lens=lengths).tensors()
        assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_a_loader_may_fill_its_tensors_again_while_a_batch_is_on_its_way() -> None:
    runner = Held(**HEAD)
    target = target_of(runner=runner)
    mask, seq_lens = LAYOUTS["packed"]
    rows, lengths = rows_for(mask.clone()), torch.tensor(seq_lens)
    expected = target_of().generate_batch(*rows, seq_lens=lengths)
    handle = target.generate_batch_async(*rows, seq_lens=lengths)
    for tensor in (*rows, lengths):
        tensor.zero_()
    runner.go_on.set()
    assert_same_batch(handle.result(), expected)


class Held(EmbeddingRunner):
    """Runs no forward before it is told to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.go_on = threading.Event()

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        assert self.go_on.wait(60.0)
        return super().forward_eagle3(input_ids, seq_lens)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mapping_that_a_draft_changes_in_place_is_not_the_targets(encoding: Encoding) -> None:
    mapping = VocabMapping.from_ids(MAPPING.selected_token_ids, VOCAB)
    target = target_of(mapping, encoding=encoding)
    expected = target_of(encoding=encoding).generate_batch(*PADDED)
    mapping.t2d.zero_()
    assert mapping.selected_token_mask.any()
    mapping.selected_token_ids.copy_(mapping.selected_token_ids.flip(0))
    mapping.selected_token_mask.zero_()
    assert_same_batch(target.generate_batch(*PADDED), expected)


class InferenceOnly(EmbeddingRunner):
    """An engine that runs under inference mode, as most do."""

    @torch.inference_mode()
    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        return super().forward_eagle3(input_ids, seq_lens)

    @torch.inference_mode()
    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(last_hidden_states)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", [EmbeddingRunner, InferenceOnly])
@pytest.mark.parametrize("layout", ["full", "ragged"])
def test_a_draft_trains_on_the_batch(encoding: Encoding, kind: type[EmbeddingRunner], layout: str) -> None:
    batch = target_of(runner=kind(vocab_size=VOCAB), encoding=encoding).generate_batch(*rows_for(LAYOUTS[layout][0]))
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in batch.tensors().values())
    torch.manual_seed(0)
    draft = torch.nn.Linear(48, VOCAB if encoding == "logits" else 20)
    optimizer = torch.optim.SGD(draft.parameters(), lr=0.1)
    wanted = batch.target_probs if batch.logits is None else batch.logits.softmax(-1)
    assert wanted is not None
    mask = batch.loss_mask if batch.position_mask is None else batch.position_mask[..., 0]
    assert mask.any()
    losses = []
    for _ in range(5):
        loss = -(wanted * draft(batch.aux_hidden_states).log_softmax(-1)).sum(-1)[mask.bool()].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_trainers_autocast_does_not_reach_the_target(encoding: Encoding) -> None:
    class Plain(EmbeddingRunner):
        def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
            head = self.draft_head(torch.arange(VOCAB))
            assert head is not None
            return head.compute_logits(last_hidden_states)

    with target_of(runner=Plain(vocab_size=VOCAB), encoding=encoding) as target:
        expected = target.generate_batch(*PADDED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = target.generate_batch(*PADDED)
            waited = target.generate_batch_async(*PADDED).result()
        assert_same_batch(inside, expected)
        assert_same_batch(waited, expected)


class MotorOptions(PluginOptions):
    dtype: str = "auto"
    loads: int = 1


class DeviceOptions(MotorOptions):
    device: str = "cpu"


class MotorAdapter(Adapter):
    name = "motor"
    options_model = MotorOptions
    loaded: ClassVar[list[tuple[str, PluginOptions, Any]]] = []
    runners: ClassVar[list[EmbeddingRunner]] = []

    @classmethod
    def engine_version(cls) -> str | None:
        return "1"

    @classmethod
    def load(cls, model: str, options: PluginOptions, aux_layer_ids: Sequence[int] | None = None) -> EmbeddingRunner:
        cls.loaded.append((model, options, aux_layer_ids))
        cls.runners.append(EmbeddingRunner(**HEAD))  # type: ignore[arg-type]
        return cls.runners[-1]


class MotorTarget(PretrainedEagle3TargetModel):
    adapter = MotorAdapter


class DeviceAdapter(MotorAdapter):
    options_model = DeviceOptions


class DeviceTarget(PretrainedEagle3TargetModel):
    adapter = DeviceAdapter


def test_a_checkpoint_is_loaded_with_the_engine_s_options() -> None:
    with MotorTarget.from_pretrained("there", (0, 1, 2), dtype=torch.bfloat16, loads="2", encoding="logits") as target:
        assert MotorAdapter.loaded[-1] == ("there", MotorOptions(dtype="bfloat16", loads=2), (0, 1, 2))
        assert target.form.encoding == "logits"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_is_the_engine_s_where_it_has_that_option_and_the_batches_elsewhere(device: Any) -> None:
    with DeviceTarget.from_pretrained("there", device=device):
        assert MotorAdapter.loaded[-1][1] == DeviceOptions(device="cpu")
    with pytest.raises(ConfigError, match="no such device"):
        MotorTarget.from_pretrained("there", device="no such device")
    with MotorTarget.from_pretrained("there", device=device) as target:
        assert target.form.device == torch.device("cpu")


def test_an_unknown_option_is_named_with_its_nearest() -> None:
    with pytest.raises(ConfigError, match=r"options of adapter 'motor': unknown option 'load', did you mean 'loads'\?"):
        MotorTarget.from_pretrained("there", load=2)


def test_a_target_that_is_refused_after_loading_is_closed() -> None:
    with pytest.raises(ContractError, match="layers"):
        MotorTarget.from_pretrained("there", (1, 2, 99))

    with pytest.raises(AdapterError, match="closed"):
        MotorAdapter.runners[-1].forward_eagle3(torch.tensor([1]), [1])
