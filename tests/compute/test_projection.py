"""The tiled projection against the full softmax."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from eagle_target.compute import projection
from eagle_target.compute.projection import RowFacts, project_draft, project_full, tile_rows
from eagle_target.contract.request import PROBS_DTYPES, SupervisionRequest, answer_spec
from eagle_target.contract.runner import DraftHead
from eagle_target.contract.sinks import PackedTensors, RowStore
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.errors import ContractError
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping

if TYPE_CHECKING:
    from eagle_target.contract.request import Encoding

VOCAB, HIDDEN = 37, 6
INFO = EmbeddingRunner(vocab_size=VOCAB, hidden_size=HIDDEN).info
SHUFFLED = shuffled_mapping(VOCAB, 9)
ASCENDING = VocabMapping.from_ids(torch.tensor([0, 4, 5, 20, 36]), VOCAB)
IDENTITY = VocabMapping.identity(VOCAB)
PERMUTED = shuffled_mapping(VOCAB, VOCAB)

ComputeLogits = Callable[[torch.Tensor], torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEAD = DraftHead(weight=3 * random(VOCAB, HIDDEN), bias=random(VOCAB, seed=1), logit_scale=0.5, soft_cap=4.0)


def project(
    hidden: torch.Tensor,
    compute_logits: ComputeLogits = HEAD.compute_logits,
    mapping: VocabMapping | None = SHUFFLED,
    encoding: Encoding = "probs",
    probs_dtype: torch.dtype = torch.float32,
) -> PackedTensors:
    sink = PackedTensors()
    request = SupervisionRequest(
        input_ids=torch.zeros(len(hidden), dtype=torch.int64),
        seq_lens=(len(hidden),),
        row_mask=torch.ones(len(hidden), dtype=torch.bool),
        encoding=encoding,
        mapping=mapping,
        probs_dtype=probs_dtype,
    )
    project_full(
        hidden,
        compute_logits,
        vocab_size=VOCAB,
        spec=answer_spec(request, INFO),
        mapping=mapping,
        sink=sink,
    )
    return sink


def use_tiles_of(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int = VOCAB) -> None:
    monkeypatch.setattr(projection, "CPU_HEAP_BYTES", 4 * vocab * rows)
    monkeypatch.setattr(projection, "CPU_TILE_ROWS", 1)
    assert tile_rows(vocab, torch.device("cpu")) == rows


@pytest.mark.parametrize("mapping", [SHUFFLED, ASCENDING, IDENTITY, PERMUTED], ids=repr)
def test_probs_are_the_softmax_over_the_draft_vocabulary_in_its_order(mapping: VocabMapping) -> None:
    hidden = random(23, HIDDEN, seed=2)
    made = project(hidden, mapping=mapping)
    logits = HEAD.compute_logits(hidden)
    assert list(made) == ["target_top_ids", "target_logsumexp", "target_probs"]
    torch.testing.assert_close(made["target_probs"], logits[:, mapping.selected_token_ids].softmax(-1))
    torch.testing.assert_close(made["target_logsumexp"], logits.logsumexp(-1))
    assert torch.equal(made["target_top_ids"], logits.argmax(-1).int())
    assert (made["target_top_ids"].dtype, made["target_logsumexp"].dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize("dtype", PROBS_DTYPES)
def test_probs_are_rounded_once_from_float32(dtype: torch.dtype) -> None:
    hidden = random(23, HIDDEN, seed=2)
    made = project(hidden, probs_dtype=dtype)["target_probs"]
    assert made.dtype == dtype
    assert torch.equal(made, project(hidden)["target_probs"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype: torch.dtype) -> None:
    logits = (4 * random(11, VOCAB)).to(dtype)
    made = project(logits, lambda rows: rows)
    expected = logits.float()
    torch.testing.assert_close(made["target_probs"], expected[:, SHUFFLED.selected_token_ids].softmax(-1))
    torch.testing.assert_close(made["target_logsumexp"], expected.logsumexp(-1))
    assert made["target_logsumexp"].dtype == torch.float32


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
@pytest.mark.parametrize("rows", [1, 2, 5, 22, 23, 24, 1000])
def test_tiles_do_not_change_values(monkeypatch: pytest.MonkeyPatch, rows: int, encoding: Encoding) -> None:
    hidden = random(23, HIDDEN, seed=2)
    whole = project(hidden, encoding=encoding)
    use_tiles_of(monkeypatch, rows)
    tiled = project(hidden, encoding=encoding)
    assert list(tiled) == list(whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(tiled[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 4 * VOCAB * 3, 1 << 30])
def test_logsumexp_blocks_do_not_change_values(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    hidden = random(23, HIDDEN, seed=2)
    monkeypatch.setattr(projection, "EXP_BLOCK_BYTES", block_bytes)
    torch.testing.assert_close(project(hidden)["target_logsumexp"], HEAD.compute_logits(hidden).logsumexp(-1))


def test_a_tile_has_at_least_one_row() -> None:
    assert tile_rows(10**9, torch.device("cpu")) == 1
    assert tile_rows(10**9, torch.device("cuda")) == 1
    assert tile_rows(1 << 18, torch.device("cpu")) == 128
    assert tile_rows(1 << 15, torch.device("cpu")) == 256
    assert tile_rows(1 << 10, torch.device("cpu")) == 31 << 8
    assert tile_rows(1 << 18, torch.device("cuda", 3)) == 256


@pytest.mark.parametrize(
    ("encoding", "mapping"),
    [
        *[(encoding, SHUFFLED) for encoding in ("probs", "hidden", "logits")],
        # A trainer that has the whole vocabulary projects `hidden` by itself.
        *[(encoding, IDENTITY) for encoding in ("probs", "logits")],
    ],
)
def test_never_two_tiles_are_alive(monkeypatch: pytest.MonkeyPatch, encoding: Encoding, mapping: VocabMapping) -> None:
    use_tiles_of(monkeypatch, 4)
    earlier: list[weakref.ref[torch.Tensor]] = []

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        assert [tile() for tile in earlier if tile() is not None] == []
        assert len(hidden) <= 4
        logits = HEAD.compute_logits(hidden)
        earlier.append(weakref.ref(logits))
        return logits

    project(random(23, HIDDEN), compute_logits, mapping=mapping, encoding=encoding)
    assert len(earlier) == 6


def test_logits_of_a_dtype_that_no_answer_has_room_for_are_refused() -> None:
    with pytest.raises(ContractError, match=r"gave torch\.float64, an answer has room for torch\.float32"):
        project(random(3, HIDDEN), lambda hidden: HEAD.compute_logits(hidden).double(), encoding="logits")
    assert project(random(3, HIDDEN), lambda hidden: HEAD.compute_logits(hidden).half(), encoding="logits")


def test_draft_projection_keeps_no_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles_of(monkeypatch, 4, SHUFFLED.draft_vocab_size)
    tiles: list[int] = []

    class CountingStore(RowStore):
        def write(self, start: int, rows: torch.Tensor) -> None:
            tiles.append(len(rows))
            super().write(start, rows)

    project_draft(random(10, HIDDEN), draft_rows(SHUFFLED), CountingStore(torch.empty(10, 9)))
    assert tiles == [4, 4, 2]


def draft_rows(mapping: VocabMapping) -> DraftHead:
    ids = mapping.selected_token_ids
    assert HEAD.bias is not None
    return DraftHead(weight=HEAD.weight[ids], bias=HEAD.bias[ids], logit_scale=HEAD.logit_scale, soft_cap=HEAD.soft_cap)


@pytest.mark.parametrize("mapping", [SHUFFLED, ASCENDING, IDENTITY, PERMUTED], ids=repr)
@pytest.mark.parametrize("dtype", PROBS_DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 23])
def test_both_projections_are_the_same_function(mapping: VocabMapping, dtype: torch.dtype, rows: int) -> None:
    hidden = random(rows, HIDDEN, seed=2)
    store = RowStore(torch.full((rows, mapping.draft_vocab_size), 7, dtype=dtype))
    project_draft(hidden, draft_rows(mapping), store)
    full = project(hidden, mapping=mapping, probs_dtype=dtype)["target_probs"]
    torch.testing.assert_close(
        store.out.float(), full.float(), atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5
    )


def test_encoding_hidden_makes_no_distribution() -> None:
    assert list(project(random(5, HIDDEN), encoding="hidden")) == ["target_top_ids", "target_logsumexp"]
    assert list(project(random(5, HIDDEN), encoding="hidden", mapping=None)) == ["target_top_ids", "target_logsumexp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_logits_keeps_the_heads_logits_and_dtype(dtype: torch.dtype) -> None:
    logits = random(5, VOCAB).to(dtype)
    made = project(logits, lambda rows: rows, encoding="logits", mapping=None)
    assert torch.equal(made["logits"], logits)
    assert made["logits"].dtype == dtype
    assert "target_probs" not in made


@pytest.mark.parametrize("encoding", ["probs", "hidden", "logits"])
def test_zero_rows_give_empty_tensors(encoding: Encoding) -> None:
    made = project(torch.empty(0, HIDDEN), encoding=encoding)
    assert made["target_top_ids"].shape == made["target_logsumexp"].shape == (0,)
    if encoding == "probs":
        assert made["target_probs"].shape == (0, 9)
    if encoding == "logits":
        assert made["logits"].shape == (0, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = random(6, VOCAB).to(dtype)
    logits[0] = 1e4
    logits[1] = -1e4
    logits[2, ::2], logits[2, 1::2] = 1e4, -1e4
    logits[3, 5:] = -torch.inf
    logits[4, [0, 4]] = -torch.inf
    made = project(logits, lambda rows: rows, mapping=ASCENDING)
    expected = logits.float()
    assert all(bool(tensor.isfinite().all()) for tensor in made.values())
    torch.testing.assert_close(made["target_logsumexp"], expected.logsumexp(-1))
    torch.testing.assert_close(made["target_probs"], expected[:, ASCENDING.selected_token_ids].softmax(-1))
    assert made["target_probs"][4, :2].tolist() == [0, 0]


def test_uniform_logits_give_the_log_of_the_vocabulary() -> None:
    made = project(torch.zeros(2, VOCAB), lambda rows: rows)
    torch.testing.assert_close(made["target_logsumexp"], torch.full((2,), float(VOCAB)).log())
    torch.testing.assert_close(made["target_probs"], torch.full((2, 9), 1 / 9))


def test_probs_sum_to_one_and_extras_give_the_full_distribution() -> None:
    hidden = random(12, HIDDEN)
    made = project(hidden, mapping=IDENTITY)
    logits = HEAD.compute_logits(hidden)
    torch.testing.assert_close(made["target_probs"].sum(-1), torch.ones(12))
    torch.testing.assert_close((logits - made["target_logsumexp"][:, None]).exp(), functional.softmax(logits, dim=-1))


@pytest.mark.parametrize("width", [VOCAB - 1, VOCAB + 3])
def test_head_of_another_width_is_refused(width: int) -> None:
    with pytest.raises(ContractError, match=rf"gave \[5, {width}\], expected \[rows, {VOCAB}\].*cut padded rows"):
        project(random(5, HIDDEN), lambda rows: torch.zeros(len(rows), width))
    with pytest.raises(ContractError, match=r"gave \[5\], expected"):
        project(random(5, HIDDEN), lambda rows: torch.zeros(len(rows)))


@pytest.mark.parametrize("mapping", [IDENTITY, PERMUTED], ids=repr)
def test_a_draft_of_the_whole_vocabulary_finds_the_row_facts_by_itself(
    monkeypatch: pytest.MonkeyPatch, mapping: VocabMapping
) -> None:
    use_tiles_of(monkeypatch, 4)
    hidden = random(23, HIDDEN, seed=2)
    probs = RowStore(torch.empty(23, VOCAB))
    facts = RowFacts(
        RowStore(torch.empty(23, dtype=torch.int32)), RowStore(torch.empty(23)), mapping.selected_token_ids
    )
    project_draft(hidden, draft_rows(mapping), probs, facts)
    expected = project(hidden, mapping=mapping)
    assert torch.equal(facts.top_ids.out, expected["target_top_ids"])
    torch.testing.assert_close(facts.logsumexp.out, expected["target_logsumexp"])
    torch.testing.assert_close(probs.out, expected["target_probs"])


def test_logsumexp_of_a_softmax_holds_for_logits_of_any_size() -> None:
    for scale in (0.0, 1.0, 30.0, 3000.0):
        logits = scale * random(7, VOCAB)
        made = projection.logsumexp_of_softmax(logits, torch.softmax(logits, dim=-1), logits.argmax(dim=-1))
        torch.testing.assert_close(made, logits.logsumexp(dim=-1))
