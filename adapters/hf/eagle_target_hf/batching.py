"""From ragged sequences to batches of one forward each: which sequences run together, and in which slots.

tokens = sum(seq_lens), packed; slots = rows*width of one batch, pads included.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

# packed: one row of several sequences. padded: right pads and no mask. masked: right pads and a mask.
# equal: only sequences of the same length share a batch.
Layout = Literal["packed", "padded", "masked", "equal"]

# What a forward costs besides its tokens, in tokens: reading the weights once and launching the kernels.
FORWARD_COST = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """Sequences that share one forward.

    starts, lengths: where each sequence begins in the request, and its tokens.
    """

    layout: Layout
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return 1 if self.layout == "packed" else len(self.lengths)

    @property
    def width(self) -> int:
        """Slots of a row."""
        return sum(self.lengths) if self.layout == "packed" else max(self.lengths)

    def token_index(self) -> torch.Tensor:
        """int64 `[rows, width]`: the request's token in each slot; a pad repeats the last token of its sequence."""
        starts, lengths = torch.tensor(self.starts), torch.tensor(self.lengths)
        if self.layout == "packed":
            return (torch.repeat_interleave(starts, lengths) + self._packed_positions())[None]
        return starts[:, None] + torch.minimum(torch.arange(self.width), lengths[:, None] - 1)

    def spans(self) -> list[tuple[int, int, int]]:
        """Where real tokens lie, as few runs as possible: (first slot, first token of the request, length) each."""
        if self.layout == "packed":
            slots = [0, *accumulate(self.lengths)]
        else:
            slots = [row * self.width for row in range(self.rows)]
        spans: list[tuple[int, int, int]] = []
        for slot, token, length in zip(slots, self.starts, self.lengths, strict=False):
            last = spans[-1] if spans else (-1, -1, 0)
            if last[0] + last[2] == slot and last[1] + last[2] == token:
                spans[-1] = (last[0], last[1], last[2] + length)
            else:
                spans.append((slot, token, length))
        return spans

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model must be told besides `input_ids`; nothing unless sequences share a row or need a mask."""
        if self.layout == "packed":
            return self._packed_inputs(device)
        if self.layout != "masked" or min(self.lengths) == self.width:
            return {}
        columns, lengths = torch.arange(self.width), torch.tensor(self.lengths)[:, None]
        return {
            "attention_mask": (columns < lengths).to(device, torch.int64),
            "position_ids": torch.minimum(columns, lengths - 1).to(device),
        }

    def _packed_inputs(self, device: torch.device) -> dict[str, Any]:
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32).to(device)
        return {
            "position_ids": self._packed_positions()[None].to(device),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(self.lengths),
            "max_length_k": max(self.lengths),
        }

    def _packed_positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])


def plan_batches(
    seq_lens: Sequence[int], *, layout: Layout, max_batch_tokens: int, length_boundary: int | None = None
) -> list[PlannedBatch]:
    """Split sequences into batches of at most `max_batch_tokens` slots; a longer sequence runs alone.

    Args:
        seq_lens: tokens of each sequence, in the order of the request.
        layout: how sequences share a batch.
        max_batch_tokens: slots of one batch.
        length_boundary: sequences up to this many tokens never share a batch with longer ones.
    """
    starts = [0, *accumulate(seq_lens)]
    split = _fill_rows if layout == "packed" else _share_width
    groups = [list(range(len(seq_lens)))]
    if length_boundary is not None:
        groups = [
            [index for index in groups[0] if seq_lens[index] <= length_boundary],
            [index for index in groups[0] if seq_lens[index] > length_boundary],
        ]
    return [
        PlannedBatch(
            layout=layout,
            starts=tuple(starts[index] for index in batch),
            lengths=tuple(seq_lens[index] for index in batch),
        )
        for group in groups
        for batch in split(group, seq_lens, max_batch_tokens, equal_only=layout == "equal")
    ]


def _fill_rows(group: list[int], seq_lens: Sequence[int], limit: int, *, equal_only: bool) -> list[list[int]]:
    """In the request's order, so that a row is one run of the request."""
    del equal_only
    batches: list[list[int]] = []
    filled = limit
    for index in group:
        if filled + seq_lens[index] > limit:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += seq_lens[index]
    return batches


def _share_width(group: list[int], seq_lens: Sequence[int], limit: int, *, equal_only: bool) -> list[list[int]]:
    """Cut the sequences, sorted by length, where slots plus `FORWARD_COST` a batch is least."""
    order = sorted(group, key=lambda index: seq_lens[index])
    best = [(0, 0)]
    for end in range(1, len(order) + 1):
        width = seq_lens[order[end - 1]]
        cuts: list[tuple[int, int]] = []
        for start in range(end - 1, -1, -1):
            slots = (end - start) * width
            if cuts and (slots > limit or (equal_only and seq_lens[order[start]] != width)):
                break
            cuts.append((best[start][0] + slots + FORWARD_COST, start))
        best.append(min(cuts))
    batches: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        batches.append(sorted(order[start:end]))
        end = start
    return batches[::-1]
