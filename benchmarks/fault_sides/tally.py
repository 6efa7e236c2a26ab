"""What came of the rounds of one fault."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eagle_target.contract.batch import Eagle3TargetBatch

    Items = dict[str, torch.Tensor]

SOON_SECONDS = 30.0


@dataclass
class Tally:
    """Batches that were right and wrong, attempts made again, errors by kind, and the longest a batch took."""

    right: int = 0
    wrong: int = 0
    retries: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0

    def take(self, ask: Callable[[], Eagle3TargetBatch], expected: Eagle3TargetBatch) -> None:
        """Ask for a batch, time it, and compare it bit for bit."""
        started = time.monotonic()
        batch = ask()
        self.longest = max(self.longest, time.monotonic() - started)
        self.compare(batch, expected)

    def compare(self, batch: Eagle3TargetBatch, expected: Eagle3TargetBatch) -> None:
        """Count a batch."""
        ours, theirs = batch.tensors(), expected.tensors()
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        self.right += same
        self.wrong += not same

    @contextlib.contextmanager
    def error(self) -> Iterator[None]:
        """Count the error that the block is to raise, and its time."""
        started = time.monotonic()
        try:
            yield
        except EagleTargetError as error:
            self.errors[type(error).__name__] += 1
        else:
            self.errors["none, but one is due"] += 1
        self.longest = max(self.longest, time.monotonic() - started)


class Fault(NamedTuple):
    """One row: what is done so many times, and what its user sees. due: error that each round ends in, if any."""

    name: str
    transport: str
    play: Callable[[Tally, int], object]
    seen: str
    due: str | None = None

    def run(self, rounds: int) -> tuple[Tally, bool]:
        """Play it; the tally, and whether all went as it should."""
        tally = Tally()
        self.play(tally, rounds)
        due = Counter({self.due: rounds} if self.due else {})
        return tally, tally.right >= rounds and not tally.wrong and tally.errors == due


@contextlib.contextmanager
def client(*urls: str, transport: str, tally: Tally, **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    """A trainer of these servers, whose retries are counted."""
    usual: dict[str, Any] = {"encoding": "logits", "timeout": SOON_SECONDS, "ready_timeout": SOON_SECONDS}
    with RemoteEagle3TargetModel.from_urls(urls, transport=transport, **{**usual, **options}) as target:
        try:
            yield target
        finally:
            tally.retries += target.model_info()["traffic"]["retries"]
