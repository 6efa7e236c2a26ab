"""Rows as trainers lay them out: by name, and drawn at random."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(letter) for letter in row] for row in rows])


@st.composite
def padded_masks(draw: st.DrawFn) -> torch.Tensor:
    seq = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, seq))
        first = draw(st.integers(0, seq - length))
        rows.append([int(first <= position < first + length) for position in range(seq)])
    mask = torch.tensor(rows)
    mask[draw(st.integers(0, len(rows) - 1)), 0] |= int(not mask.any())
    return mask


@st.composite
def packed_masks(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[int]]]:
    seq = draw(st.integers(2, 10))
    rows, seq_lens = [], []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, seq))
        first = draw(st.integers(0, seq - length))
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
        lengths = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
        if draw(st.booleans()):
            lengths[0] += first
            lengths[-1] += seq - first - length
        rows.append([int(first <= position < first + length) for position in range(seq)])
        seq_lens.append(lengths)
    width = max(len(lengths) for lengths in seq_lens)
    return torch.tensor(rows), [[*lengths, *[0] * (width - len(lengths))] for lengths in seq_lens]


LAYOUTS: dict[str, tuple[torch.Tensor, list[list[int]] | None]] = {
    "full": (mask_of("1" * 12, "1" * 12), None),
    "right": (mask_of("111111100000", "111111111111", "100000000000"), None),
    "left": (mask_of("000001111111", "111111111111", "000000000001"), None),
    "ragged": (mask_of("001111111000", "000000000000", "011111111111"), None),
    "packed": (mask_of("111111111111", "111111111100"), [[5, 1, 6], [7, 3, 0]]),
    "packed to the width": (mask_of("111111111111", "111111111100"), [[5, 1, 6], [7, 5, 0]]),
    "packed with left pads": (mask_of("001111111111", "000111111110"), [[4, 6, 0], [5, 2, 1]]),
    "packed to the width with left pads": (mask_of("001111111111", "000111111110"), [[6, 6], [8, 4]]),
}
