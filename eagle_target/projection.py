"""From last hidden states to the distribution over the draft vocabulary, a tile of rows at a time.

rows x hidden -> tile x vocab logits -> argmax, logsumexp, columns of the draft vocabulary -> softmax.
Never more than one tile of full-vocabulary logits is alive. Pure functions of tensors, CPU and CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Callable

    from eagle_target.rows import RowStore, Sink
    from eagle_target.runner import DraftHead
    from eagle_target.vocabulary import VocabMapping

    ComputeLogits = Callable[[torch.Tensor], torch.Tensor]

Encoding = Literal["probs", "hidden", "logits"]
RowPolicy = Literal["supervised", "all"]
PROBS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CPU_TILE_BYTES = 128 << 20
CUDA_TILE_BYTES = 256 << 20
EXP_BLOCK_BYTES = 16 << 20


@torch.no_grad()
def project_full(
    last_hidden_states: torch.Tensor,
    compute_logits: ComputeLogits,
    *,
    vocab_size: int,
    encoding: Encoding,
    mapping: VocabMapping | None,
    probs_dtype: torch.dtype,
    sink: Sink,
) -> None:
    """Project `[rows, hidden]` through the full head and store what the encoding needs.

    Stores `target_top_ids` int32 `[rows]`, `target_logsumexp` float32 `[rows]` and, for encoding `probs`,
    `target_probs` `[rows, draft_vocab]`, or for `logits`, `logits` `[rows, vocab]`. The softmax and the
    logsumexp are taken in float32 whatever the head's dtype.

    Raises:
        ContractError: the head returned another shape than `[tile, vocab_size]`.
    """
    rows = len(last_hidden_states)
    top_ids = sink.allocate("target_top_ids", (rows,), torch.int32)
    logsumexp = sink.allocate("target_logsumexp", (rows,), torch.float32)
    probs: RowStore | None = None
    logits_store: RowStore | None = None
    if encoding == "probs" and mapping is not None:
        probs = sink.allocate("target_probs", (rows, mapping.draft_vocab_size), probs_dtype)
    tile = tile_rows(vocab_size, last_hidden_states.device)
    scratch = _Scratch(min(tile, rows))
    starts = range(0, rows, tile) if rows or encoding != "logits" else (0,)
    for start in starts:
        logits = compute_logits(last_hidden_states[start : start + tile])
        _check_logits(logits, vocab_size)
        if encoding == "logits":
            logits_store = logits_store or sink.allocate("logits", (rows, vocab_size), logits.dtype)
            logits_store.write(start, logits)
        if not len(logits):
            continue
        best = logits.argmax(dim=-1)
        top_ids.write(start, best)
        logsumexp.write(start, scratch.logsumexp(logits, best))
        if probs is not None and mapping is not None:
            probs.write(start, scratch.draft_softmax(logits, mapping))
        # Two tiles would be alive while the head makes the next one.
        del logits


def project_draft(last_hidden_states: torch.Tensor, head: DraftHead, store: RowStore) -> None:
    """Project `[rows, hidden]` through the draft's rows of the head and store the softmax `[rows, draft_vocab]`.

    The same function whether the server's process or a client's runs it.
    """
    tile = tile_rows(len(head.weight), last_hidden_states.device)
    for start in range(0, len(last_hidden_states), tile):
        with torch.autocast(last_hidden_states.device.type, enabled=False):
            logits = head.compute_logits(last_hidden_states[start : start + tile])
        store.write(start, torch.softmax(logits, dim=-1, dtype=torch.float32))
        del logits


def tile_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of float32 logits that fit one tile on a device; at least one."""
    budget = CPU_TILE_BYTES if device.type == "cpu" else CUDA_TILE_BYTES
    return max(1, budget // (4 * vocab_size))


def _check_logits(logits: torch.Tensor, vocab_size: int) -> None:
    if logits.dim() != 2 or logits.shape[1] != vocab_size:
        raise ContractError(
            f"compute_logits gave {list(logits.shape)}, expected [rows, {vocab_size}]: "
            "the adapter must cut padded rows of its head"
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

    def logsumexp(self, logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """float32 `[tile]` from `[tile, vocab]`, a block of rows at a time."""
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
