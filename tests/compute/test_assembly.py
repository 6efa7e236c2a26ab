"""From a trainer's rows to a ragged request and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle_target.compute import projection
from eagle_target.compute.assembly import BatchAssembler
from eagle_target.compute.layout import TrainerRows, read_trainer_rows
from eagle_target.compute.supervise import compute_supervision
from eagle_target.contract.request import PROBS_DTYPES
from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ContractError, ProtocolError, VocabMappingError
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from tests.compute.layouts import LAYOUTS, mask_of
from tests.oracle import assert_matches, oracle_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.request import Encoding, RowPolicy, SupervisionRequest

VOCAB = 53
MAPPING = shuffled_mapping(VOCAB, 12)
RUNNER = EmbeddingRunner(vocab_size=VOCAB, bias=True, logit_scale=0.5, soft_cap=4.0)
CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = mask_of("11111", "01110")
LOSS = mask_of("11011", "11111")


def read(**changes: Any) -> TrainerRows:
    arguments: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "loss_mask": LOSS, "vocab_size": VOCAB}
    return read_trainer_rows(**(arguments | changes))


def request_of(rows: TrainerRows, encoding: Encoding = "probs", policy: RowPolicy = "supervised") -> SupervisionRequest:
    return rows.request(encoding=encoding, rows=policy, mapping=MAPPING, probs_dtype=torch.float32)


def garbage(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that was never zeroed."""
    return torch.full(tuple(shape), 77, dtype=dtype)


def assembler_for(rows: TrainerRows, request: SupervisionRequest) -> BatchAssembler:
    head = RUNNER.draft_head(MAPPING.selected_token_ids)
    return BatchAssembler(rows, request, info=RUNNER.info, draft_head=head, device=CPU, allocate=garbage)


def full_forward(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    forward = RUNNER.forward_eagle3(torch.tensor(ids), [len(ids)])
    return forward.aux_hidden_states, RUNNER.compute_logits(forward.last_hidden_states)


def finish(assembler: BatchAssembler, supervision: PackedTensors) -> Eagle3TargetBatch:
    for name, tensor in supervision.items():
        assembler.put(name, tensor)
    return assembler.finish()


def supervise(request: SupervisionRequest) -> PackedTensors:
    sink = PackedTensors()
    compute_supervision(RUNNER, request, sink)
    return sink


# Reading


def test_request_is_ragged_and_asks_for_rows_that_bear_loss() -> None:
    request = request_of(read())
    assert request.input_ids.tolist() == [3, 1, 4, 1, 5, 2, 6, 5]
    assert request.seq_lens == (5, 3)
    assert request.row_mask.tolist() == [False, True, False, True, True, False, True, True]
    request.check(RUNNER.info)


def test_request_for_all_rows_leaves_out_what_nobody_predicts() -> None:
    assert request_of(read(), policy="all").row_mask.tolist() == [False, True, True, True, True, False, True, True]


def test_first_token_of_a_document_is_never_asked_for() -> None:
    request = request_of(read(attention_mask=torch.ones_like(MASK), seq_lens=[[2, 3], [5]]))
    assert request.seq_lens == (2, 3, 5)
    assert request.row_mask.tolist() == [False, True, False, True, True, False, True, True, True, True]


def test_ids_at_pads_may_be_anything() -> None:
    ids = IDS.masked_fill(MASK == 0, -100)
    assert torch.equal(request_of(read(input_ids=ids)).input_ids, request_of(read()).input_ids)


def test_packing_fields_are_derived_and_zero_at_pads() -> None:
    rows = read(attention_mask=mask_of("11111", "11110"), seq_lens=[[2, 3], [4]])
    assert rows.position_ids is not None
    assert rows.doc_remaining is not None
    assert rows.seq_lens is not None
    assert rows.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert rows.doc_remaining.tolist() == [[1, 0, 2, 1, 0], [3, 2, 1, 0, 0]]
    assert rows.seq_lens.tolist() == [[2, 3], [4, 0]]
    assert rows.seq_lens.dtype == torch.int64


def test_packing_fields_that_are_given_are_kept() -> None:
    given = {
        "seq_lens": torch.tensor([[2, 3], [5, 0]], dtype=torch.int32),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]),
        "doc_remaining": torch.tensor([[1, 0, 2, 1, 0], [4, 3, 2, 1, 0]]),
    }
    rows = read(attention_mask=torch.ones_like(MASK), **given)
    assert all(torch.equal(getattr(rows, name), tensor) for name, tensor in given.items())
    assert rows.seq_lens is not None
    assert rows.seq_lens.dtype == torch.int32


def test_unpacked_rows_have_no_packing_fields() -> None:
    rows = read()
    assert (rows.position_ids, rows.seq_lens, rows.doc_remaining) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": IDS.int()}, r"input_ids must be int64 \[batch, seq\], got torch\.int32 \[2, 5\]"),
        ({"input_ids": IDS.float()}, r"got torch\.float32 \[2, 5\]"),
        ({"input_ids": IDS[0]}, r"got torch\.int64 \[5\].*unsqueeze"),
        ({"input_ids": IDS[None]}, r"got torch\.int64 \[1, 2, 5\]"),
        (
            {"input_ids": IDS[:, :0], "attention_mask": MASK[:, :0], "loss_mask": LOSS[:, :0]},
            r"got torch\.int64 \[2, 0\]",
        ),
        ({"attention_mask": MASK[:1]}, r"attention_mask is \[1, 5\], input_ids \[2, 5\]"),
        ({"attention_mask": MASK[:, None, None, :]}, r"attention_mask is \[2, 1, 1, 5\]"),
        ({"loss_mask": LOSS[..., None]}, r"loss_mask is \[2, 5, 1\]"),
        ({"attention_mask": MASK * 2}, "attention_mask has 2 at row 0, position 0: it must be 0 or 1"),
        ({"loss_mask": LOSS * 0.5}, "loss_mask has 0.5 at row 0, position 0"),
        ({"loss_mask": LOSS.float().where(LOSS == 1, torch.nan)}, "loss_mask has nan at row 0, position 2"),
        ({"loss_mask": -LOSS}, "loss_mask has -1 at row 0, position 0"),
        ({"attention_mask": mask_of("11111", "01011")}, "attention_mask has a hole at row 1, position 2"),
        ({"attention_mask": MASK * 0}, r"attention_mask \[2, 5\] is all zero"),
        ({"input_ids": IDS.masked_fill(IDS == 4, VOCAB)}, f"input_ids has {VOCAB} at token 2, .* 0 to {VOCAB - 1}"),
        ({"input_ids": IDS.masked_fill(IDS == 6, -1)}, "input_ids has -1 at token 6"),
        ({"seq_lens": [[5], [2]]}, "seq_lens row 1 adds up to 2"),
        ({"seq_lens": torch.ones(2, 1)}, "seq_lens must be integers"),
        ({"position_ids": torch.arange(5)[None]}, r"position_ids must be integers \[2, 5\], got torch\.int64 \[1, 5\]"),
        ({"position_ids": torch.zeros(2, 5)}, r"position_ids must be integers \[2, 5\], got torch\.float32"),
        ({"position_ids": torch.arange(5).expand(2, 5)}, "position_ids has 1 at row 1, position 1, expected 0"),
        (
            {"doc_remaining": torch.zeros(2, 4).long()},
            r"doc_remaining must be integers \[2, 5\], got torch\.int64 \[2, 4\]",
        ),
        ({"doc_remaining": torch.zeros(2, 5)}, r"doc_remaining must be integers \[2, 5\], got torch\.float32"),
    ],
)
def test_bad_rows_are_refused_with_their_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        read(**changes)


def test_position_ids_that_cross_documents_are_refused() -> None:
    with pytest.raises(ContractError, match="position_ids has 2 at row 0, position 2, expected 0: it restarts at 0"):
        read(
            attention_mask=torch.ones_like(MASK),
            seq_lens=[[2, 3], [5]],
            position_ids=torch.arange(5).expand(2, 5),
        )


def test_position_ids_at_pads_may_be_anything() -> None:
    given = torch.tensor([[0, 1, 2, 3, 4], [9, 0, 1, 2, 9]])
    kept = read(position_ids=given).position_ids
    assert kept is not None
    assert torch.equal(kept, given)


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_probabilities_need_a_mapping_before_anything_is_sent(encoding: Encoding) -> None:
    with pytest.raises(VocabMappingError, match=f"'{encoding}' needs a vocabulary mapping"):
        read().request(encoding=encoding, rows="all", mapping=None, probs_dtype=torch.float32).check(RUNNER.info)


def test_unknown_row_policy_is_refused() -> None:
    with pytest.raises(ContractError, match=r"rows must be one of \('supervised', 'all'\), got 'some'"):
        read().row_mask("some")  # type: ignore[arg-type]


# Assembling


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
@pytest.mark.parametrize("policy", ["supervised", "all"])
def test_batch_is_the_oracles_and_zero_where_nothing_was_asked(
    layout: str, encoding: Encoding, policy: RowPolicy
) -> None:
    mask, seq_lens = LAYOUTS[layout]
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB, mask.shape, generator=draw)
    loss = torch.randint(2, mask.shape, generator=draw)
    rows = read_trainer_rows(ids, mask, loss, vocab_size=VOCAB, seq_lens=seq_lens)
    request = request_of(rows, encoding, policy)
    expected = oracle_batch(
        full_forward,
        ids,
        mask,
        loss,
        selected_token_ids=MAPPING.selected_token_ids.tolist(),
        seq_lens=seq_lens,
        rows=policy,
        encoding=encoding,
    )
    direct = assembler_for(rows, request)
    compute_supervision(RUNNER, request, direct)
    assert_matches(direct.finish().tensors(), expected)
    sent = finish(assembler_for(rows, request), supervise(request))
    assert_matches(sent.tensors(), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32])
def test_masks_keep_their_dtype_and_change_nothing_else(dtype: torch.dtype) -> None:
    rows = read(attention_mask=MASK.to(dtype), loss_mask=LOSS.to(dtype))
    made = finish(assembler_for(rows, request_of(rows)), supervise(request_of(rows)))
    assert made.loss_mask.dtype == made.attention_mask.dtype == dtype
    assert made.loss_mask.tolist() == [[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert made.position_mask is not None
    assert (made.position_mask.dtype, made.position_mask.shape) == (torch.bool, (2, 5, 1))
    plain = finish(assembler_for(read(), request_of(read())), supervise(request_of(read())))
    for name in set(plain.tensors()) - {"attention_mask", "loss_mask"}:
        assert torch.equal(made.tensors()[name], plain.tensors()[name])


def test_masks_need_not_be_contiguous() -> None:
    rows = read(input_ids=IDS.T.contiguous().T, attention_mask=MASK.T.contiguous().T, loss_mask=LOSS.T.contiguous().T)
    assert torch.equal(request_of(rows).input_ids, request_of(read()).input_ids)
    assert torch.equal(request_of(rows).row_mask, request_of(read()).row_mask)


def test_batch_has_the_documented_dtypes() -> None:
    tensors = finish(assembler_for(read(), request_of(read())), supervise(request_of(read()))).tensors()
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "aux_hidden_states": torch.float32,
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "loss_mask": torch.int64,
        "target_probs": torch.float32,
        "position_mask": torch.bool,
        "target_top_ids": torch.int32,
        "target_logsumexp": torch.float32,
    }


@pytest.mark.parametrize("dtype", PROBS_DTYPES)
@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_probabilities_have_the_dtype_asked_for(dtype: torch.dtype, encoding: Encoding) -> None:
    rows = read()
    request = rows.request(encoding=encoding, rows="all", mapping=MAPPING, probs_dtype=dtype)
    made = finish(assembler_for(rows, request), supervise(request))
    assert made.target_probs is not None
    assert made.target_probs.dtype == dtype


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
@pytest.mark.parametrize("policy", ["supervised", "all"])
def test_batch_that_bears_no_loss_is_all_zero_supervision(encoding: Encoding, policy: RowPolicy) -> None:
    rows = read(loss_mask=torch.zeros_like(LOSS))
    made = finish(
        assembler_for(rows, request_of(rows, encoding, policy)), supervise(request_of(rows, encoding, policy))
    )
    assert not made.loss_mask.any()
    assert made.position_mask is None or not made.position_mask.any()
    if policy == "supervised":
        assert not made.target_top_ids.any() if made.target_top_ids is not None else False
        assert made.target_probs is None or not made.target_probs.any()


class BigStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every storage of at least so many bytes that an operation gave."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = nbytes
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.nbytes:
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return result


@pytest.mark.parametrize(("encoding", "width"), [("probs", 40), ("hidden", 40), ("logits", 211)])
def test_the_distribution_is_in_memory_once(monkeypatch: pytest.MonkeyPatch, encoding: Encoding, width: int) -> None:
    # Neither heads nor hidden states are as large as the distribution of these rows; a tile is 4 of them.
    monkeypatch.setattr(projection, "CPU_HEAP_BYTES", 4 * 4 * width)
    monkeypatch.setattr(projection, "CPU_TILE_ROWS", 1)
    runner, mapping = EmbeddingRunner(hidden_size=2), shuffled_mapping(211, 40)
    ids = torch.arange(200).view(2, 100)
    rows = read_trainer_rows(ids, torch.ones_like(ids), torch.ones_like(ids), vocab_size=211)
    request = rows.request(encoding=encoding, rows="supervised", mapping=mapping, probs_dtype=torch.float32)
    assembler = BatchAssembler(
        rows,
        request,
        info=runner.info,
        draft_head=runner.draft_head(mapping.selected_token_ids),
        device=CPU,
        allocate=lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype),
    )
    with BigStorages(198 * width * 4) as big:
        compute_supervision(runner, request, assembler)
        batch = assembler.finish()
    distribution = batch.logits if batch.target_probs is None else batch.target_probs
    assert distribution is not None
    assert list(big.storages) == [distribution.untyped_storage().data_ptr()]


# Supervision that is not what was asked for


def test_supervision_nobody_asked_for_is_refused() -> None:
    request = request_of(read())
    assembler = assembler_for(read(), request)
    with pytest.raises(ProtocolError, match=r"target_probs \[4, 12\] .* not \[5, 12\]"):
        assembler.put("target_probs", torch.zeros(4, 12))
    with pytest.raises(ProtocolError, match=r"aux_hidden_states \[7, 48\] .* not \[8, 48\]"):
        assembler.put("aux_hidden_states", torch.zeros(7, 48))
    with pytest.raises(ProtocolError, match=r"target_top_ids \[\]"):
        assembler.put("target_top_ids", torch.tensor(1))
    with pytest.raises(ProtocolError, match=r"target_top_ids .* of torch.int64, not .* of torch.int32"):
        assembler.put("target_top_ids", torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ProtocolError, match=r"stranger .* once too often"):
        assembler.allocate("stranger", (0, 1 << 40), torch.float32)


def test_supervision_given_twice_is_refused() -> None:
    assembler = assembler_for(read(), request_of(read()))
    assembler.put("target_top_ids", torch.zeros(5).int())
    with pytest.raises(ProtocolError, match=r"target_top_ids \[5\] of torch.int32 once too often"):
        assembler.put("target_top_ids", torch.zeros(5).int())


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_supervision_that_lacks_a_tensor_is_refused(encoding: Encoding) -> None:
    request = request_of(read(), encoding)
    whole = supervise(request)
    for missing in whole:
        assembler = assembler_for(read(), request)
        for name, tensor in whole.items():
            if name != missing:
                assembler.put(name, tensor)
        with pytest.raises(ProtocolError, match=missing):
            assembler.finish()


@pytest.mark.parametrize("rows", [4, 6])
def test_hidden_states_of_another_length_are_refused(rows: int) -> None:
    request = request_of(read(), "hidden")
    whole = supervise(request)
    whole["last_hidden_states"] = torch.zeros(rows, 16)
    with pytest.raises(ProtocolError, match=r"not \[5, 16\]"):
        finish(assembler_for(read(), request), whole)


@pytest.mark.parametrize("name", ["target_top_ids", "target_logsumexp"])
def test_extras_of_another_rank_are_refused(name: str) -> None:
    request = request_of(read())
    whole = supervise(request)
    whole[name] = whole[name][:, None]
    with pytest.raises(ProtocolError, match=name):
        finish(assembler_for(read(), request), whole)


def test_probabilities_of_another_width_are_refused() -> None:
    request = request_of(read())
    whole = supervise(request)
    whole["target_probs"] = torch.zeros(5, 11)
    with pytest.raises(ProtocolError, match="target_probs"):
        finish(assembler_for(read(), request), whole)
