"""What a schedule is made of: trainers' rows, mappings, and clients beside which the oracle runs."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.errors import ConnectError, TransportError
from eagle_target.testing.comparison import assert_same_batch
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from tests.server.cases import VOCAB_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from eagle_target.backend import Prefetch
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.vocab_mapping import VocabMapping

Rows = dict[str, torch.Tensor]
SOON_SECONDS = 60.0
LONGEST = 24


def draw_rows(seed: int) -> Rows:
    """A batch: 1 to 3 rows of any lengths, padded left or right, or packed with up to three documents."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    batch, seq = number(1, 3), number(1, LONGEST)
    attention = torch.zeros(batch, seq, dtype=torch.int64)
    documents = torch.zeros(batch, 3, dtype=torch.int64)
    is_packed, is_left = number(0, 2) == 0, number(0, 1) == 0
    for row in range(batch):
        length = number(1, seq)
        attention[row, slice(seq - length, seq) if is_left and not is_packed else slice(0, length)] = 1
        cuts = sorted({0, length, *(number(1, length) for _ in range(2))})
        for place, (start, end) in enumerate(itertools.pairwise(cuts)):
            documents[row, place] = end - start
    rows = {
        "input_ids": torch.randint(VOCAB_SIZE, (batch, seq), generator=draw),
        "attention_mask": attention,
        "loss_mask": attention * (torch.rand(batch, seq, generator=draw) < 0.6),
    }
    return {**rows, "seq_lens": documents} if is_packed else rows


# Few of them, so that clients share some, and restarted servers have forgotten them.
mappings = st.builds(
    lambda size, seed: shuffled_mapping(VOCAB_SIZE, size, seed=seed), st.sampled_from([2, 37, 150]), st.integers(0, 2)
)
rows = st.integers(0, 1 << 20).map(draw_rows)
many_rows = st.lists(rows, min_size=1, max_size=6)


@dataclass(eq=False)
class Asked:
    """A batch that was asked for: its rows, and the mapping at that moment."""

    rows: Rows
    mapping: VocabMapping


@dataclass(eq=False)
class Trainer:
    """A client, the oracle of its options, and what it has on its way."""

    remote: RemoteEagle3TargetModel
    oracle: RunnerEagle3TargetModel
    mapping: VocabMapping
    futures: list[tuple[Asked, Future[Eagle3TargetBatch]]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    @classmethod
    def connect(cls, url: str, transport: str, mapping: VocabMapping, **form: Any) -> Trainer:
        remote = RemoteEagle3TargetModel.from_urls([url], transport=transport, timeout=SOON_SECONDS, **form)
        form.pop("checksum", None)
        trainer = cls(remote, RunnerEagle3TargetModel(EmbeddingRunner(), **form), mapping)
        trainer.choose(mapping)
        return trainer

    def choose(self, mapping: VocabMapping) -> None:
        self.remote.set_vocab_mapping(mapping)
        self.mapping = mapping

    def ask(self, item: Rows) -> None:
        self.futures.append((Asked(item, self.mapping), self.remote.generate_batch_async(**item)))

    def check(self, asked: Asked, batch: Eagle3TargetBatch) -> None:
        self.oracle.set_vocab_mapping(asked.mapping)
        assert_same_batch(batch, self.oracle.generate_batch(**asked.rows))

    def collect(self) -> None:
        """Every batch that was asked for is there, and right."""
        for asked, future in self.futures:
            self.check(asked, future.result(SOON_SECONDS))
        self.futures.clear()

    def close(self) -> None:
        """What is on its way is right, or an error that says that the client was closed."""
        self.remote.close()
        for asked, future in self.futures:
            if future.cancelled():
                continue
            error = future.exception(SOON_SECONDS)
            assert error is None or isinstance(error, TransportError), error
            if error is None:
                self.check(asked, future.result())
        for stream in self.streams:
            stream.finish_closed()


class Stream:
    """A prefetch, and what it was given so far. Each item has the mapping of the moment it was asked for."""

    def __init__(self, trainer: Trainer, items: list[Rows], depth: int) -> None:
        self._trainer = trainer
        self._asked: deque[Asked] = deque()
        self._items = items
        self._is_over = False
        self._prefetch: Prefetch = trainer.remote.prefetch(self._feed(), depth=depth)
        trainer.streams.append(self)

    def _feed(self) -> Iterator[Rows]:
        for item in self._items:
            self._asked.append(Asked(item, self._trainer.mapping))
            yield item

    def take(self, count: int) -> None:
        """The next batches, in the order of the items."""
        for _ in range(0 if self._is_over else count):
            batch = next(self._prefetch, None)
            if batch is None:
                assert not self._asked
                return
            self._trainer.check(self._asked.popleft(), batch)

    def drop(self) -> None:
        """Cancel it, with what it has on its way."""
        self._prefetch.close()
        self._is_over = True

    def finish_closed(self) -> None:
        """Of a closed client: the batches that had come, and an error."""
        if self._is_over:
            return
        self._is_over = True
        try:
            while (batch := next(self._prefetch, None)) is not None:
                self._trainer.check(self._asked.popleft(), batch)
        except ConnectError:
            pass
