"""A client that compares every batch with a target in its own process: `python -m benchmarks.server_sides.soaker`."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import answer_commands
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.contract.batch import Eagle3TargetBatch

VOCAB = 509
HIDDEN = 32
DRAFT_VOCAB = 100
DEPTH = 3
LONGEST = 160


def draw_item(draw: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch for a trainer: rows of mixed lengths, padded left or right, or packed with several documents."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    batch, seq = number(1, 4), number(2, LONGEST)
    ids = torch.randint(VOCAB, (batch, seq), generator=draw)
    attention = torch.zeros(batch, seq, dtype=torch.int64)
    item: dict[str, torch.Tensor] = {}
    is_packed, is_left = number(0, 2) == 0, number(0, 1) == 0
    seq_lens = torch.zeros(batch, 2, dtype=torch.int64)
    for row in range(batch):
        length = number(1, seq)
        attention[row, slice(seq - length, seq) if is_left and not is_packed else slice(0, length)] = 1
        first = number(1, length)
        seq_lens[row, : 1 + (length > first)] = torch.tensor([first, length - first][: 1 + (length > first)])
    loss = attention * (torch.rand(batch, seq, generator=draw) < 0.6)
    item = {"input_ids": ids * attention, "attention_mask": attention, "loss_mask": loss}
    return {**item, "seq_lens": seq_lens} if is_packed else item


class Soaker:
    """Takes batches with some on their way; the target beside it says what each has to be.

    Args:
        url: the server. transport, encoding: of the client. seed: of its batches.
    """

    def __init__(self, url: str, transport: str, encoding: Any, seed: int) -> None:
        self._remote = RemoteEagle3TargetModel.from_urls([url], transport=transport, encoding=encoding)
        self._here = RunnerEagle3TargetModel(EmbeddingRunner(vocab_size=VOCAB, hidden_size=HIDDEN), encoding=encoding)
        for target in (self._remote, self._here):
            target.set_vocab_mapping(shuffled_mapping(VOCAB, DRAFT_VOCAB))
        self._draw = torch.Generator().manual_seed(seed)

    def work(self, seconds: float) -> dict[str, Any]:
        """Take batches for so long: how many, how many of them are wrong or are missing, and how many tokens."""
        asked: deque[dict[str, torch.Tensor]] = deque()
        is_over = False

        def items() -> Iterator[dict[str, torch.Tensor]]:
            for _ in itertools.takewhile(lambda _: not is_over, itertools.count()):
                asked.append(draw_item(self._draw))
                yield asked[-1]

        started = time.perf_counter()
        batches = wrong = tokens = 0
        for batch in self._remote.prefetch(items(), depth=DEPTH):
            item = asked.popleft()
            batches += 1
            tokens += int(item["attention_mask"].sum())
            wrong += not _same(batch, self._here.generate_batch(**item))
            is_over = time.perf_counter() - started >= seconds
        return {"batches": batches, "wrong": wrong, "lost": len(asked), "tokens": tokens}

    def close(self) -> None:
        """Close both targets."""
        self._remote.close()
        self._here.close()


def _same(batch: Eagle3TargetBatch, expected: Eagle3TargetBatch) -> bool:
    ours, theirs = batch.tensors(), expected.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def main() -> None:
    url, transport, encoding, seed = sys.argv[1:]
    torch.set_num_threads(1)
    soaker = Soaker(url, transport, encoding, int(seed))
    answer_commands({"work": soaker.work})
    soaker.close()


if __name__ == "__main__":
    main()
