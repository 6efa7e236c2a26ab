"""Which sequences share a forward: as many as the request and KV pools hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """What one prefill may hold.

    sequences: slots of the request pool. tokens: of the KV pool. page_size: each sequence takes whole pages.
    context_length: the longest sequence of the model.
    """

    sequences: int
    tokens: int
    page_size: int
    context_length: int

    @property
    def max_seq_len(self) -> int:
        """The longest sequence that fits."""
        return min(self.context_length, self.tokens // self.page_size * self.page_size)

    def split(self, seq_lens: Sequence[int]) -> Iterator[range]:
        """Cut sequences, in order, into groups of one prefill each.

        Raises:
            AdapterError: a sequence is longer than any prefill; names the limit.
        """
        self.check(seq_lens)
        start, used = 0, 0
        for index, length in enumerate(seq_lens):
            needed = -(-length // self.page_size) * self.page_size
            if index > start and (used + needed > self.tokens or index - start == self.sequences):
                yield range(start, index)
                start, used = index, 0
            used += needed
        yield range(start, len(seq_lens))

    def check(self, seq_lens: Sequence[int]) -> None:
        """Refuse what no split makes fit.

        Raises:
            AdapterError: names the limit and the option that raises it.
        """
        longest = max(seq_lens, default=0)
        if not seq_lens or min(seq_lens) < 1:
            raise AdapterError(f"seq_lens must be positive, got {list(seq_lens)[:8]}")
        if longest > self.max_seq_len:
            what = (
                f"the model's context_length of {self.context_length}"
                if self.max_seq_len == self.context_length
                else f"the KV pool of {self.tokens} tokens: raise max_total_tokens"
            )
            raise AdapterError(f"a sequence has {longest} tokens, over {what}")
