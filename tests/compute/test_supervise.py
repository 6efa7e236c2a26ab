"""From a ragged request to ragged supervision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target.compute.supervise import check_forward, compute_supervision, split_forward, store_supervision
from eagle_target.contract.request import SupervisionRequest, answer_spec
from eagle_target.contract.runner import TargetForward
from eagle_target.contract.sinks import PackedTensors
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import ContractError, VocabMappingError
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import Encoding

VOCAB = 53
MAPPING = shuffled_mapping(VOCAB, 12)
RUNNER = EmbeddingRunner(vocab_size=VOCAB, max_seq_len=9)


def ids_of(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))


def request(**changes: Any) -> SupervisionRequest:
    row_mask = torch.tensor([False, True, False, True, True, False, True])
    fields: dict[str, Any] = {"input_ids": ids_of(7), "seq_lens": (5, 2), "row_mask": row_mask, "mapping": MAPPING}
    return SupervisionRequest(**(fields | changes))


def supervise(wanted: SupervisionRequest, runner: Any = RUNNER) -> PackedTensors:
    sink = PackedTensors()
    compute_supervision(runner, wanted, sink)
    return sink


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_good_request_passes(encoding: Encoding) -> None:
    request(encoding=encoding).check(RUNNER.info)
    assert request().tokens == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": ids_of(7).int()}, r"input_ids must be .*torch\.int64 with 7 elements, got torch\.int32 \[7\]"),
        ({"input_ids": ids_of(7).float()}, r"got torch\.float32 \[7\]"),
        ({"input_ids": ids_of(7)[None]}, r"input_ids must be .* got torch\.int64 \[1, 7\]"),
        ({"input_ids": torch.tensor(3)}, r"input_ids must be .* got torch\.int64 \[\]"),
        ({"input_ids": ids_of(0), "seq_lens": (), "row_mask": torch.zeros(0, dtype=torch.bool)}, r"non-empty.*\[0\]"),
        ({"row_mask": torch.ones(7, dtype=torch.uint8)}, r"row_mask must be .*torch\.bool.* got torch\.uint8 \[7\]"),
        ({"row_mask": torch.ones(6, dtype=torch.bool)}, r"row_mask must be .*7 elements, got torch\.bool \[6\]"),
        ({"row_mask": torch.ones(7, 1, dtype=torch.bool)}, r"row_mask must be .*got torch\.bool \[7, 1\]"),
        ({"row_mask": torch.tensor(True)}, r"row_mask must be .*got torch\.bool \[\]"),
        ({"seq_lens": (5, 1)}, "the 7 tokens of input_ids, got 2 lengths that add up to 6"),
        ({"seq_lens": (5, 0, 2)}, "must be positive.*got 3 lengths"),
        ({"seq_lens": (8, -1)}, "must be positive.*got 2 lengths"),
        ({"seq_lens": ()}, "got 0 lengths that add up to 0"),
        ({"input_ids": torch.tensor([0, 1, VOCAB, 2, 3, 4, 5])}, f"has {VOCAB} at token 2, .* 0 to {VOCAB - 1}"),
        ({"input_ids": torch.tensor([0, 1, 2, 3, 4, 5, -100])}, "has -100 at token 6"),
        ({"encoding": "tokens"}, r"encoding must be one of \('probs', 'hidden', 'logits'\), got 'tokens'"),
        ({"probs_dtype": torch.float64}, "probs_dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"probs_dtype": torch.int64}, "got torch.int64"),
    ],
)
def test_bad_request_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        request(**changes).check(RUNNER.info)


def test_ids_are_left_to_whoever_checked_the_rows_and_nothing_else_is() -> None:
    unknown = torch.tensor([0, 1, VOCAB, 2, 3, 4, 5])
    request(input_ids=unknown).check_but_ids(RUNNER.info)
    with pytest.raises(ContractError, match="add up to 6"):
        request(input_ids=unknown, seq_lens=(5, 1)).check_but_ids(RUNNER.info)


def test_too_long_sequence_is_refused() -> None:
    row_mask = torch.ones(10, dtype=torch.bool)
    request(input_ids=ids_of(10), seq_lens=(1, 9), row_mask=row_mask).check(RUNNER.info)
    with pytest.raises(ContractError, match="a sequence has 10 tokens, the target takes 9"):
        request(input_ids=ids_of(10), seq_lens=(10,), row_mask=row_mask).check(RUNNER.info)
    request(input_ids=ids_of(10), seq_lens=(10,), row_mask=row_mask).check(EmbeddingRunner(vocab_size=VOCAB).info)


def test_probs_need_a_mapping_and_the_others_do_not() -> None:
    with pytest.raises(VocabMappingError, match="'probs' needs a vocabulary mapping: call set_vocab_mapping"):
        request(mapping=None).check(RUNNER.info)
    request(mapping=None, encoding="hidden").check(RUNNER.info)
    request(mapping=None, encoding="logits").check(RUNNER.info)


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_mapping_of_another_vocabulary_is_refused(encoding: Encoding) -> None:
    with pytest.raises(VocabMappingError, match=f"vocabulary of 54, the target's has {VOCAB}"):
        request(mapping=shuffled_mapping(54, 12), encoding=encoding).check(RUNNER.info)


def test_supervision_of_each_sequence_is_its_own() -> None:
    both = supervise(request(row_mask=torch.ones(7, dtype=torch.bool)))
    first = supervise(request(input_ids=ids_of(7)[:5], seq_lens=(5,), row_mask=torch.ones(5, dtype=torch.bool)))
    second = supervise(request(input_ids=ids_of(7)[5:], seq_lens=(2,), row_mask=torch.ones(2, dtype=torch.bool)))
    for name in both:
        torch.testing.assert_close(both[name], torch.cat([first[name], second[name]]))


def test_rows_are_those_asked_for() -> None:
    wanted = request()
    some, every = supervise(wanted), supervise(request(row_mask=torch.ones(7, dtype=torch.bool)))
    assert set(some) == {"aux_hidden_states", "target_top_ids", "target_logsumexp", "target_probs"}
    for name in some:
        expected = every[name] if name == "aux_hidden_states" else every[name][wanted.row_mask]
        torch.testing.assert_close(some[name], expected)
    assert some["aux_hidden_states"].shape == (7, 3 * 16)


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
@pytest.mark.parametrize("mapping", [MAPPING, VocabMapping.identity(VOCAB)], ids=["some", "whole"])
def test_an_answer_is_what_its_spec_says(encoding: Encoding, mapping: VocabMapping) -> None:
    wanted = request(encoding=encoding, mapping=mapping, probs_dtype=torch.bfloat16)
    made, spec = supervise(wanted), answer_spec(wanted, RUNNER.info)
    assert set(made) == set(spec)
    for name, tensor in made.items():
        assert (tuple(tensor.shape), tensor.dtype) == (spec[name].shape, spec[name].dtype)
        assert spec[name].fits(tensor.shape, tensor.dtype)
        assert spec[name].nbytes == tensor.nbytes
        assert len(tensor) == (7 if spec[name].axis == "tokens" else 4)


def test_logits_may_be_narrower_than_their_spec_and_nothing_else_may() -> None:
    spec = answer_spec(request(encoding="logits"), RUNNER.info)
    shape = (4, VOCAB)
    assert str(spec["logits"]) == f"[4, {VOCAB}] of torch.float32 or narrower"
    assert all(spec["logits"].fits(shape, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not any(spec["logits"].fits(shape, dtype) for dtype in (torch.float64, torch.int32, torch.bool))
    assert not spec["logits"].fits((4, VOCAB + 1), torch.float32)
    assert not spec["aux_hidden_states"].fits((7, 48), torch.bfloat16)


def test_logits_of_a_known_dtype_are_of_no_other() -> None:
    info = RUNNER.info.model_copy(update={"dtype": "float64"})
    assert answer_spec(request(encoding="logits"), info)["logits"].dtype == torch.float64
    known = answer_spec(request(encoding="logits"), info, logits_dtype=torch.bfloat16)["logits"]
    assert known.nbytes == 4 * VOCAB * 2
    assert known.fits((4, VOCAB), torch.bfloat16)
    assert not known.fits((4, VOCAB), torch.float16)


def test_encodings_carry_what_they_say() -> None:
    forward = RUNNER.forward_eagle3(ids_of(7), (5, 2))
    rows = request().row_mask
    hidden = supervise(request(encoding="hidden", mapping=None))
    assert torch.equal(hidden["last_hidden_states"], forward.last_hidden_states[rows])
    assert not {"target_probs", "logits"} & set(hidden)
    logits = supervise(request(encoding="logits", mapping=None))
    torch.testing.assert_close(logits["logits"], RUNNER.compute_logits(forward.last_hidden_states)[rows])
    assert not {"target_probs", "last_hidden_states"} & set(logits)


def test_nothing_is_projected_for_a_trainer_that_projects_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = request(encoding="hidden", mapping=shuffled_mapping(RUNNER.info.vocab_size, RUNNER.info.vocab_size))
    expected = supervise(request(encoding="hidden"))
    monkeypatch.setattr(EmbeddingRunner, "compute_logits", None)
    made = supervise(whole)
    assert set(made) == {"aux_hidden_states", "last_hidden_states"}
    assert torch.equal(made["last_hidden_states"], expected["last_hidden_states"])


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_no_rows_asked_for_is_no_error(encoding: Encoding) -> None:
    made = supervise(request(row_mask=torch.zeros(7, dtype=torch.bool), encoding=encoding))
    assert made["target_top_ids"].shape == (0,)
    assert made["aux_hidden_states"].shape == (7, 48)


@pytest.mark.parametrize("encoding", ["probs", "logits"])
def test_targets_own_logits_are_used_instead_of_the_head(encoding: Encoding) -> None:
    class Composite(EmbeddingRunner):
        def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
            forward = super().forward_eagle3(input_ids, seq_lens)
            return TargetForward(
                aux_hidden_states=forward.aux_hidden_states,
                last_hidden_states=torch.zeros_like(forward.last_hidden_states),
                logits=super().compute_logits(forward.last_hidden_states),
            )

        def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the logits are given")

    plain, composite = (
        supervise(request(encoding=encoding)),
        supervise(request(encoding=encoding), Composite(vocab_size=VOCAB)),
    )
    assert list(plain) == list(composite)
    for name in plain:
        torch.testing.assert_close(plain[name], composite[name])


def test_no_gradient_is_recorded() -> None:
    class Learning(EmbeddingRunner):
        def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return super().compute_logits(last_hidden_states)

    made = supervise(request(), Learning(vocab_size=VOCAB))
    assert not any(tensor.requires_grad for tensor in made.values())


@pytest.mark.parametrize("with_logits", [False, True])
def test_joined_requests_are_split_back_with_the_same_bits(with_logits: bool) -> None:
    sizes = [(3, 2), (1,), (4,)]
    requests = [
        request(input_ids=ids_of(sum(lens), seed), seq_lens=lens, row_mask=torch.ones(sum(lens), dtype=torch.bool))
        for seed, lens in enumerate(sizes)
    ]
    joined = RUNNER.forward_eagle3(
        torch.cat([one.input_ids for one in requests]), [length for one in requests for length in one.seq_lens]
    )
    if with_logits:
        joined = TargetForward(
            aux_hidden_states=joined.aux_hidden_states,
            last_hidden_states=joined.last_hidden_states,
            logits=RUNNER.compute_logits(joined.last_hidden_states),
        )
    parts = split_forward(joined, [one.tokens for one in requests])
    assert parts[1].aux_hidden_states.data_ptr() == joined.aux_hidden_states[5:].data_ptr()
    for one, part in zip(requests, parts, strict=True):
        check_forward(part, one.tokens, RUNNER.info)
        sink = PackedTensors()
        store_supervision(RUNNER, one, part, sink)
        alone = supervise(one)
        assert all(torch.equal(sink[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("aux_hidden_states", (7, 47), "[7, 48]"),
        ("last_hidden_states", (6, 16), "[7, 16]"),
        ("logits", (7, VOCAB + 11), f"[7, {VOCAB}]"),
    ],
)
def test_engine_output_of_another_shape_is_refused(name: str, shape: tuple[int, int], expected: str) -> None:
    shapes = {"aux_hidden_states": (7, 48), "last_hidden_states": (7, 16), "logits": (7, VOCAB)} | {name: shape}
    forward = TargetForward(**{field: torch.zeros(size) for field, size in shapes.items()})
    with pytest.raises(ContractError) as refusal:
        check_forward(forward, 7, RUNNER.info)
    assert str(refusal.value) == f"engine embedding 1 gave {name} {list(shape)}, expected {expected}"
