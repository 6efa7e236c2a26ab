"""From last hidden states to the distribution over the draft vocabulary, a tile of rows at a time.

rows x hidden -> tile x vocab logits -> argmax, logsumexp, columns of the draft vocabulary -> softmax.
Never more than one tile of full-vocabulary logits is alive. Pure functions of tensors, CPU and CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eagle_target.contract.request import TensorSpec
    from eagle_target.contract.runner import DraftHead
    from eagle_target.contract.sinks import RowStore, Sink
    from eagle_target.contract.vocab_mapping import VocabMapping

    ComputeLogits = Callable[[torch.Tensor], torch.Tensor]

# Under 32 MiB the C library gives a tile's memory again to the next one; above, each tile is fresh pages.
CPU_HEAP_BYTES = 31 << 20
# A head of many ids is read once a tile, which fewer rows do not repay.
CPU_TILE_ROWS = 256
CPU_TILE_BYTES = 128 << 20
CUDA_TILE_BYTES = 256 << 20
EXP_BLOCK_BYTES = 16 << 20


@torch.no_grad()
def project_full(
    last_hidden_states: torch.Tensor,
    compute_logits: ComputeLogits,
    *,
    vocab_size: int,
    spec: Mapping[str, TensorSpec],
    mapping: VocabMapping | None,
    sink: Sink,
) -> None:
    """Project `[rows, hidden]` through the full head and store what a request's `answer_spec` has of it.

    These are `target_top_ids` and `target_logsumexp`, and `target_probs` or `logits`. The softmax and the logsumexp
    are taken in float32 whatever the head's dtype.

    Raises:
        ContractError: the head returned another shape than `[tile, vocab_size]`, or logits of a dtype that is too wide.
    """
    rows = len(last_hidden_states)
    top_ids, logsumexp = (_allocate(sink, name, spec) for name in ("target_top_ids", "target_logsumexp"))
    probs = _allocate(sink, "target_probs", spec) if "target_probs" in spec else None
    logits_spec = spec.get("logits")
    logits_store: RowStore | None = None
    tile = tile_rows(vocab_size, last_hidden_states.device)
    scratch = _Scratch(min(tile, rows))
    starts = range(0, rows, tile) if rows or logits_spec is None else (0,)
    for start in starts:
        logits = compute_logits(last_hidden_states[start : start + tile])
        _check_logits(logits, vocab_size, logits_spec)
        if logits_spec is not None:
            logits_store = logits_store or sink.allocate("logits", logits_spec.shape, logits.dtype)
            logits_store.write(start, logits)
        if not len(logits):
            continue
        best = logits.argmax(dim=-1)
        top_ids.write(start, best)
        softmax: torch.Tensor | None = None
        if probs is not None and mapping is not None:
            draft_probs = scratch.draft_softmax(logits, mapping)
            probs.write(start, draft_probs)
            softmax = draft_probs if mapping.is_identity else None
        logsumexp.write(start, scratch.logsumexp(logits, best, softmax))
        # Two tiles would be alive while the head makes the next one.
        del logits


class RowFacts(NamedTuple):
    """Where `project_draft` puts what it finds beside the distribution, for a draft that has the whole vocabulary.

    top_ids: int32 `[rows]`. logsumexp: float32 `[rows]`. ids: the target's id of each of the draft's, int64.
    """

    top_ids: RowStore
    logsumexp: RowStore
    ids: torch.Tensor


def project_draft(
    last_hidden_states: torch.Tensor, head: DraftHead, store: RowStore, facts: RowFacts | None = None
) -> None:
    """Project `[rows, hidden]` through the draft's rows of the head and store the softmax `[rows, draft_vocab]`.

    The same function whether the server's process or a client's runs it.
    """
    tile = tile_rows(len(head.weight), last_hidden_states.device)
    scratch: torch.Tensor | None = None
    for start in range(0, len(last_hidden_states), tile):
        with torch.autocast(last_hidden_states.device.type, enabled=False):
            logits = head.compute_logits(last_hidden_states[start : start + tile])
        if scratch is None:
            scratch = torch.empty_like(logits, dtype=torch.float32)
        probs = torch.softmax(logits, dim=-1, dtype=torch.float32, out=scratch[: len(logits)])
        store.write(start, probs)
        if facts is not None:
            best = logits.argmax(dim=-1)
            facts.top_ids.write(start, facts.ids[best])
            facts.logsumexp.write(start, logsumexp_of_softmax(logits, probs, best))
        del logits


def logsumexp_of_softmax(logits: torch.Tensor, probs: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """float32 `[tile]` from `[tile, vocab]`, its softmax and its argmax, without a second pass over the vocabulary.

    log p = logit - logsumexp; the argmax has at least one part in `vocab` of the mass, so its logarithm is exact.
    """
    column = best[:, None]
    return (logits.gather(1, column).float() - probs.gather(1, column).log())[:, 0]


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of float32 logits that fit one tile on a device; at least one."""
    row_bytes = 4 * vocab_size
    if device.type != "cpu":
        return max(1, CUDA_TILE_BYTES // row_bytes)
    return max(1, CPU_HEAP_BYTES // row_bytes, min(CPU_TILE_ROWS, CPU_TILE_BYTES // row_bytes))


def _allocate(sink: Sink, name: str, spec: Mapping[str, TensorSpec]) -> RowStore:
    return sink.allocate(name, spec[name].shape, spec[name].dtype)


def _check_logits(logits: torch.Tensor, vocab_size: int, spec: TensorSpec | None) -> None:
    if logits.dim() != 2 or logits.shape[1] != vocab_size:
        raise ContractError(
            f"compute_logits gave {list(logits.shape)}, expected [rows, {vocab_size}]: "
            "the adapter must cut padded rows of its head"
        )
    if spec is not None and not spec.fits_dtype(logits.dtype):
        raise ContractError(
            f"compute_logits gave {logits.dtype}, an answer has room for {spec.dtype}: the adapter must convert them"
        )


class _Scratch:
    """Memory for what is computed from a tile of at most `rows` rows, taken once for all tiles.

    Fresh memory costs the CPU more than the arithmetic on it, and tiles of logits between short-lived tensors
    fragment its heap.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._columns: torch.Tensor | None = None
        self._probs: torch.Tensor | None = None
        self._exp: torch.Tensor | None = None

    def draft_softmax(self, logits: torch.Tensor, mapping: VocabMapping) -> torch.Tensor:
        """float32 `[tile, draft_vocab]` from `[tile, vocab]`, until the next call."""
        count, width = len(logits), mapping.draft_vocab_size
        if self._probs is None:
            self._probs = logits.new_empty(self._rows, width, dtype=torch.float32)
        columns = logits
        if not mapping.is_identity:
            if self._columns is None:
                self._columns = logits.new_empty(self._rows, width)
            columns = torch.index_select(logits, 1, mapping.selected_token_ids, out=self._columns[:count])
        return torch.softmax(columns, dim=-1, dtype=torch.float32, out=self._probs[:count])

    def logsumexp(self, logits: torch.Tensor, best: torch.Tensor, softmax: torch.Tensor | None) -> torch.Tensor:
        """float32 `[tile]` from `[tile, vocab]`: of a softmax that is there, or a block of rows at a time."""
        if softmax is not None:
            return logsumexp_of_softmax(logits, softmax, best)
        count, width = logits.shape
        if self._exp is None:
            on_cpu = logits.device.type == "cpu"
            block = max(1, EXP_BLOCK_BYTES // (4 * width)) if on_cpu else self._rows // 4 + 1
            self._exp = logits.new_empty(min(block, self._rows), width, dtype=torch.float32)
        top = logits.gather(1, best[:, None]).float()
        total = torch.empty_like(top)
        for start in range(0, count, len(self._exp)):
            part = slice(start, min(start + len(self._exp), count))
            exp = torch.sub(logits[part], top[part], out=self._exp[: part.stop - start]).exp_()
            torch.sum(exp, dim=1, keepdim=True, out=total[part])
        return (top + total.log_())[:, 0]
